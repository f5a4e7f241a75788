#!/bin/sh
# Sets up the poolgate agent on this host, for Linux and macOS: an environment of its own, the agent, and a service that runs
# it. Run it again to update or repair. What it reads from the environment:
#   POOLGATE_AGENT_KEY    provider key, where none is filled in below
#   POOLGATE_DIR          where everything goes (default: /opt/poolgate-agent for root, else ~/.poolgate-agent)
#   POOLGATE_AGENT_ARGS   further arguments of the agent, as: --model /srv/llama (see agent.pyz --help)
#   POOLGATE_ENGINE       none: don't install vLLM where there is an NVIDIA GPU
#   POOLGATE_SERVICE      systemd, launchd or none (the agent supervises itself); default: what this host has
set -eu

main() { # whole before it runs, and with an input of its own: this script may be coming through a pipe

gateway=@GATEWAY@
key=@KEY@
sha256=@SHA256@
requirements=@REQUIREMENTS@

say() { printf 'poolgate: %s\n' "$*"; }
fail() { printf 'poolgate: %s\n' "$*" >&2; exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }
is_root() { [ "$(id -u)" = 0 ]; }

key=${key:-${POOLGATE_AGENT_KEY:-}}
[ -n "$key" ] || fail "no provider key: set POOLGATE_AGENT_KEY to yours and run this again"
case $key in
    *[!A-Za-z0-9._-]*) fail "the provider key has a character that keys don't have" ;;
esac

if is_root; then default_dir=/opt/poolgate-agent; else default_dir=$HOME/.poolgate-agent; fi
dir=${POOLGATE_DIR:-$default_dir}
case $dir in
    /*) ;;
    *) fail "POOLGATE_DIR must be an absolute path" ;;
esac
case $dir in
    *[!A-Za-z0-9/._-]*) fail "POOLGATE_DIR may have letters, digits, and / . _ - only: service managers read it" ;;
esac
umask 077

find_python() {
    for name in python3 python3.14 python3.13 python3.12 python3.11; do
        if has "$name" && "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
}

python=$(find_python)
if [ -z "$python" ] && is_root; then
    if has apt-get; then
        say "installing Python with apt-get"
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            python3 python3-venv ca-certificates >/dev/null
    elif has dnf; then
        say "installing Python with dnf"
        dnf install -y -q python3.11 >/dev/null
    fi
    python=$(find_python)
fi
[ -n "$python" ] || fail "Python 3.11 or newer with its venv module is needed (Debian, Ubuntu: apt-get install python3-venv)"

say "installing into $dir"
mkdir -p "$dir/data"
[ -x "$dir/venv/bin/python" ] || "$python" -m venv "$dir/venv"
in_venv=$dir/venv/bin/python
requirements="$requirements uvloop>=0.21" # turns through the agent cost it half as much
has_gpu=no
if has nvidia-smi && nvidia-smi -L >/dev/null 2>&1; then
    has_gpu=yes
    requirements="$requirements nvidia-ml-py>=12"
fi
# shellcheck disable=SC2086 # a list of requirements
"$in_venv" -m pip install --quiet --disable-pip-version-check $requirements

engine_args=
if [ "$has_gpu" = yes ] && [ "${POOLGATE_ENGINE:-}" != none ]; then
    say "installing vLLM into an environment of its own (several GB, takes minutes)"
    [ -x "$dir/engine/bin/python" ] || "$python" -m venv "$dir/engine"
    "$dir/engine/bin/python" -m pip install --quiet --disable-pip-version-check 'vllm>=0.12'
    engine_args="--engine-python $dir/engine/bin/python"
elif [ "$has_gpu" = no ]; then
    say "no NVIDIA GPU here: the node reports itself without engines, until --engine-url or --model gives it one"
fi

say "downloading the agent"
POOLGATE_KEY=$key "$in_venv" - "$gateway" "$sha256" "$dir" <<'PYTHON'
import hashlib, os, pathlib, sys, urllib.error, urllib.request, zipfile

gateway, sha256, folder = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
request = urllib.request.Request(
    gateway + "/api/providers/download/daemon", headers={"x-provider-key": os.environ["POOLGATE_KEY"]}
)
try:
    with urllib.request.urlopen(request, timeout=120) as answer:
        content = answer.read()
except urllib.error.HTTPError as error:
    sys.exit(f"poolgate: the gateway answered {error.code} to the download: {error.read(300).decode(errors='replace')}")
except OSError as error:
    sys.exit(f"poolgate: {gateway} can't be reached: {error}")
if hashlib.sha256(content).hexdigest() != sha256:
    sys.exit("poolgate: the download is not what this script expects (SHA-256 differs): get a new script and try again")
new = folder / "agent.pyz.new"
new.write_bytes(content)
launcher = zipfile.ZipFile(new).read("nodes/agent/launcher.py")
(folder / "launcher.py").write_bytes(launcher)
(folder / "trial").unlink(missing_ok=True)
new.replace(folder / "agent.pyz")
PYTHON

printf 'POOLGATE_AGENT_KEY=%s\n' "$key" >"$dir/agent.env"
cat >"$dir/run" <<RUN
#!/bin/sh
# Runs the agent and keeps it running; SIGTERM ends it in order.
set -a
. "$dir/agent.env"
set +a
unset POOLGATE_DIR POOLGATE_AGENT_ARGS POOLGATE_ENGINE POOLGATE_SERVICE
cd "$dir"
exec "$in_venv" "$dir/launcher.py" --gateway $gateway --data-dir "$dir/data" $engine_args ${POOLGATE_AGENT_ARGS:-} "\$@"
RUN
chmod 700 "$dir/run"
rm -f "$dir/data/online"

service=${POOLGATE_SERVICE:-auto}
if [ "$service" = auto ]; then
    if [ -d /run/systemd/system ] && is_root; then
        service=systemd
    elif [ "$(uname -s)" = Darwin ]; then
        service=launchd
    else
        service=none
    fi
fi

case $service in
    systemd)
        cat >/etc/systemd/system/poolgate-agent.service <<UNIT
[Unit]
Description=poolgate agent
Wants=network-online.target
After=network-online.target

[Service]
ExecStart=$dir/run
# The launcher ends in order when another agent has this node: starting again would take it from that one.
Restart=on-failure
RestartSec=5
# The agent drains its engines first; only the launcher is told, everything is killed in the end.
KillMode=mixed
TimeoutStopSec=90

[Install]
WantedBy=multi-user.target
UNIT
        systemctl daemon-reload
        systemctl enable --quiet poolgate-agent.service
        systemctl restart poolgate-agent.service
        logs="journalctl -u poolgate-agent"
        ;;
    launchd)
        if is_root; then agents=/Library/LaunchDaemons; domain=system
        else agents=$HOME/Library/LaunchAgents; domain=gui/$(id -u); fi
        mkdir -p "$agents"
        cat >"$agents/org.poolgate.agent.plist" <<PLIST
<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<plist version="1.0"><dict>
<key>Label</key><string>org.poolgate.agent</string>
<key>ProgramArguments</key><array><string>$dir/run</string></array>
<key>RunAtLoad</key><true/>
<key>KeepAlive</key><dict><key>SuccessfulExit</key><false/></dict>
<key>StandardErrorPath</key><string>$dir/agent.log</string>
<key>StandardOutPath</key><string>$dir/agent.log</string>
</dict></plist>
PLIST
        launchctl bootout "$domain/org.poolgate.agent" 2>/dev/null || true
        launchctl bootstrap "$domain" "$agents/org.poolgate.agent.plist"
        logs="$dir/agent.log"
        ;;
    none)
        if [ -f "$dir/launcher.pid" ] && kill -0 "$(cat "$dir/launcher.pid")" 2>/dev/null; then
            say "stopping the agent that runs"
            old=$(cat "$dir/launcher.pid")
            kill "$old"
            tries=0
            while kill -0 "$old" 2>/dev/null && [ $tries -lt 90 ]; do tries=$((tries + 1)); sleep 1; done
        fi
        nohup "$dir/run" >>"$dir/agent.log" 2>&1 </dev/null &
        echo $! >"$dir/launcher.pid"
        logs="$dir/agent.log"
        if has crontab; then
            { crontab -l 2>/dev/null | grep -vF "$dir/run" || true; echo "@reboot $dir/run >>$dir/agent.log 2>&1"; } | crontab -
            say "no service manager: the agent supervises itself, and cron starts it with the host"
        else
            say "no service manager: the agent supervises itself until the host restarts (then run $dir/run again)"
        fi
        ;;
    *) fail "POOLGATE_SERVICE must be systemd, launchd or none" ;;
esac

say "waiting for the gateway"
tries=0
while [ ! -f "$dir/data/online" ] && [ $tries -lt 60 ]; do
    tries=$((tries + 1))
    sleep 1
done
if [ -f "$dir/data/online" ]; then
    say "this node is online"
else
    say "the agent runs, but the gateway has not taken it yet; a provider must be approved first. See: $logs"
    exit 3
fi

}

main </dev/null
exit 0 # what a pipe of another system puts behind the script is not run
