"""From settings to running processes: `baton serve`, fleet files, devices, child processes by record.

`plan` and `fleet_file` say what runs where and start nothing; `serve` and the scripts start it.
"""
