//! Processes of this machine, by what `/proc` says of them.

use std::{fs, path::Path, time::Duration};

use anyhow::Context as _;

/// A process and its command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its ID.
    pub pid: i32,
    /// Its words.
    pub command: Vec<String>,
}

/// Every process with `text` somewhere on its command line, but for the caller.
pub fn naming(text: &str) -> Vec<Process> {
    let ours = i32::try_from(std::process::id()).unwrap_or_default();
    all()
        .into_iter()
        .filter(|process| process.pid != ours && process.command.join(" ").contains(text))
        .collect()
}

fn all() -> Vec<Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let line = fs::read_to_string(entry.path().join("cmdline")).ok()?;
            let command: Vec<String> = line.split_terminator('\0').map(str::to_owned).collect();
            // An empty one is a kernel thread's, or of a process that only waits to be collected.
            (!command.is_empty()).then_some(Process { pid, command })
        })
        .collect()
}

/// The microVMs that run in a state directory.
pub fn vmms(state: &Path) -> Vec<Process> {
    let homes = state.join("agent/vms").display().to_string();
    naming(&homes).into_iter().filter(|process| process.command[0].contains("qemu")).collect()
}

/// The microVM of a sandbox, by what its host's journal says.
pub fn vmm_of(state: &Path, sandbox_id: &str) -> Option<Process> {
    let records = fs::read_dir(state.join("agent/journal")).ok()?.flatten();
    let record = records.map(|entry| entry.path()).find(|path| {
        let text = fs::read(path).unwrap_or_default();
        let record: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
        record["stage"]["sandbox"] == sandbox_id
    })?;
    let home = state.join("agent/vms").join(record.file_stem()?).display().to_string();
    vmms(state).into_iter().find(|vmm| vmm.command.join(" ").contains(&home))
}

/// How long the machine runs.
///
/// # Errors
///
/// If the kernel does not say.
pub fn uptime() -> anyhow::Result<Duration> {
    let text = fs::read_to_string("/proc/uptime")?;
    let seconds = text.split_whitespace().next().context("an empty /proc/uptime")?;
    Ok(Duration::from_secs_f64(seconds.parse()?))
}

/// When a process was started, by the clock of [`uptime`], to a hundredth of a second.
///
/// # Errors
///
/// If it has gone.
pub fn started_at(pid: i32) -> anyhow::Result<Duration> {
    time(pid, 22)
}

/// What a process has taken of the processors, to a hundredth of a second.
///
/// # Errors
///
/// If it has gone.
pub fn cpu_time(pid: i32) -> anyhow::Result<Duration> {
    Ok(time(pid, 14)? + time(pid, 15)?)
}

/// The processes that a process has started and that have not ended.
///
/// # Errors
///
/// If it has gone.
pub fn children(pid: i32) -> anyhow::Result<Vec<i32>> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    text.split_whitespace().map(|pid| pid.parse().context("no process ID")).collect()
}

/// A field of `/proc/PID/stat` that is a time (proc_pid_stat(5)).
fn time(pid: i32, field: usize) -> anyhow::Result<Duration> {
    /// A clock tick as user space sees it (`USER_HZ`).
    const TICK_MS: u64 = 10;
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Behind the program's name, which may hold anything, field 3 is the first.
    let (_, fields) = text.rsplit_once(')').context("no name")?;
    let ticks: u64 = fields.split_whitespace().nth(field - 3).context("too few fields")?.parse()?;
    Ok(Duration::from_millis(ticks * TICK_MS))
}

/// A number of `/proc/PID/smaps_rollup` or `/proc/PID/status`, KiB; none if the process has gone.
pub fn memory_kib(pid: i32, file: &str, field: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    line.trim_start_matches(':').split_whitespace().next()?.parse().ok()
}
