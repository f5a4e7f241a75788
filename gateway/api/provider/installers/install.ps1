# Sets up the poolgate agent on Windows: inside WSL 2, which is where vLLM runs on Windows, with a scheduled task that starts it.
# Run it in PowerShell; run it again to update or repair. $env:POOLGATE_DISTRO names another WSL distribution than the default one.
$ErrorActionPreference = 'Stop'

$Gateway = @GATEWAY@
$Key = @KEY@
if (-not $Key) { $Key = $env:POOLGATE_AGENT_KEY }
if (-not $Key) { throw 'poolgate: no provider key: set $env:POOLGATE_AGENT_KEY to yours and run this again' }

if (-not (Get-Command wsl.exe -ErrorAction SilentlyContinue)) {
    throw 'poolgate: WSL 2 is needed: run "wsl --install" as administrator, restart Windows, and run this again'
}
$Distro = @()
if ($env:POOLGATE_DISTRO) { $Distro = @('-d', $env:POOLGATE_DISTRO) }
& wsl.exe @Distro -u root -e true
if ($LASTEXITCODE -ne 0) {
    throw 'poolgate: WSL has no distribution that starts: run "wsl --install -d Ubuntu", and run this again'
}

Write-Host 'poolgate: installing inside WSL'
$Script = (Invoke-WebRequest -UseBasicParsing -Uri "$Gateway/api/providers/download/setup?os=linux" -Headers @{ 'x-provider-key' = $Key }).Content
if ($Script -is [byte[]]) { $Script = [Text.Encoding]::UTF8.GetString($Script) }
$Script.Replace("`r", '') | & wsl.exe @Distro -u root -e env POOLGATE_SERVICE=none sh -s
if ($LASTEXITCODE -ne 0 -and $LASTEXITCODE -ne 3) { throw 'poolgate: the installation inside WSL failed; its words are above' }

# WSL ends a distribution that nobody uses: the task keeps the agent in the foreground, and so the distribution up.
& wsl.exe @Distro -u root -e sh -c 'test -f /opt/poolgate-agent/launcher.pid && kill $(cat /opt/poolgate-agent/launcher.pid); rm -f /opt/poolgate-agent/launcher.pid; true'
$Arguments = (@($Distro) + @('-u', 'root', '-e', '/opt/poolgate-agent/run')) -join ' '
$Action = New-ScheduledTaskAction -Execute 'wsl.exe' -Argument $Arguments
$Trigger = New-ScheduledTaskTrigger -AtLogOn -User $env:USERNAME
$Settings = New-ScheduledTaskSettingsSet -AllowStartIfOnBatteries -DontStopIfGoingOnBatteries -ExecutionTimeLimit ([TimeSpan]::Zero) -RestartCount 999 -RestartInterval (New-TimeSpan -Minutes 1)
Register-ScheduledTask -TaskName 'poolgate agent' -Action $Action -Trigger $Trigger -Settings $Settings -Force | Out-Null
Start-ScheduledTask -TaskName 'poolgate agent'
Write-Host 'poolgate: the scheduled task "poolgate agent" runs the node'
