//! Control groups: what a VM may take of the host, and which processes are its own.
//!
//! Every VM's process joins its group before it becomes the VMM, and cannot leave it. So a group is also the one
//! true answer to "which processes belong to this VM", across restarts of the agent. Version 1 with its tree for each
//! controller and version 2 with one tree for all are both in use; the same three limits are set in either.

use std::{
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tokio::time::{Instant, sleep};

const ROOT: &str = "/sys/fs/cgroup";
/// What a VM is bounded by.
pub const CONTROLLERS: [&str; 3] = ["memory", "cpu", "pids"];
/// Beside other users of control groups.
const PARENT: &str = "opencomputer";
/// Scheduling period, microseconds: the kernel's default (Documentation/scheduler/sched-bwc.rst).
const PERIOD_US: u64 = 100_000;
/// Killed processes leave their group when their memory is given back.
const EMPTY_WITHIN: Duration = Duration::from_secs(20);

/// What a VM may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Memory, bytes.
    pub memory_bytes: u64,
    /// CPU time, in thousandths of one CPU.
    pub cpu_millis: u64,
    /// Processes and threads.
    pub pids: u32,
}

/// The groups of one agent's VMs.
#[derive(Clone, Debug)]
pub struct Cgroups {
    /// One for each tree.
    parents: Vec<PathBuf>,
    is_unified: bool,
}

/// The group of one VM.
#[derive(Clone, Debug)]
pub struct Cgroup {
    dirs: Vec<PathBuf>,
    is_unified: bool,
}

impl Cgroups {
    /// The groups called `name` on this host. Nothing is made yet.
    ///
    /// # Errors
    ///
    /// If the host lacks a controller.
    pub fn find(name: &str) -> io::Result<Self> {
        let root = Path::new(ROOT);
        let is_unified = root.join("cgroup.controllers").exists();
        let trees =
            if is_unified { vec![root.to_owned()] } else { CONTROLLERS.map(|tree| root.join(tree)).to_vec() };
        if let Some(missing) = trees.iter().find(|tree| !tree.join("cgroup.procs").exists()) {
            let message = format!(
                "{} is no mounted cgroup: mount the memory, cpu and pids controllers",
                missing.display()
            );
            return Err(io::Error::new(io::ErrorKind::NotFound, message));
        }
        let parents = trees.into_iter().map(|tree| tree.join(PARENT).join(name)).collect();
        Ok(Self { parents, is_unified })
    }

    /// Makes the parents of all groups.
    ///
    /// # Errors
    ///
    /// If this host does not let the agent.
    pub fn prepare(&self) -> io::Result<()> {
        for parent in &self.parents {
            fs::create_dir_all(parent)?;
            if self.is_unified {
                let enable = CONTROLLERS.map(|controller| format!("+{controller}")).join(" ");
                // From the root down, the parent itself included: its children are to have the controllers.
                let mut chain: Vec<_> = parent.ancestors().take_while(|dir| dir.starts_with(ROOT)).collect();
                chain.reverse();
                for dir in chain {
                    set(dir, "cgroup.subtree_control", &enable)?;
                }
            }
        }
        Ok(())
    }

    /// The group of the VM called `vm`.
    pub fn of(&self, vm: &str) -> Cgroup {
        let dirs = self.parents.iter().map(|parent| parent.join(vm)).collect();
        Cgroup { dirs, is_unified: self.is_unified }
    }

    /// Names the VMs that have a group, or a part of one.
    ///
    /// # Errors
    ///
    /// If they cannot be listed.
    pub fn existing(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for parent in &self.parents {
            let entries = match fs::read_dir(parent) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                entries => entries?,
            };
            for entry in entries {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    names.push(entry.file_name().to_string_lossy().into_owned());
                }
            }
        }
        Ok(names)
    }

    /// Removes the parents that are empty.
    ///
    /// # Errors
    ///
    /// If one resists although it is empty.
    pub fn clean_up(&self) -> io::Result<()> {
        for parent in &self.parents {
            remove_dir(parent)?;
            // Other agents may have theirs beside it.
            if let Some(shared) = parent.parent() {
                let _ = fs::remove_dir(shared);
            }
        }
        Ok(())
    }
}

impl Cgroup {
    /// Makes the group with its limits.
    ///
    /// # Errors
    ///
    /// If it cannot be made, or a limit cannot be set.
    pub fn create(&self, limits: Limits) -> io::Result<()> {
        for dir in &self.dirs {
            match fs::create_dir(dir) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
        }
        let (memory, pids) = (limits.memory_bytes.to_string(), limits.pids.to_string());
        let quota = limits.cpu_millis * PERIOD_US / 1000;
        match &self.dirs[..] {
            [unified] => {
                set(unified, "memory.max", &memory)?;
                set(unified, "cpu.max", &format!("{quota} {PERIOD_US}"))?;
                set(unified, "pids.max", &pids)
            }
            [memory_dir, cpu_dir, pids_dir] => {
                set(memory_dir, "memory.limit_in_bytes", &memory)?;
                set(cpu_dir, "cpu.cfs_period_us", &PERIOD_US.to_string())?;
                set(cpu_dir, "cpu.cfs_quota_us", &quota.to_string())?;
                set(pids_dir, "pids.max", &pids)
            }
            _ => Err(io::Error::other("a group in trees that nobody knows")),
        }
    }

    /// What a process of one thread writes `0` into to join, one file for each tree. Opened by root, used by whoever
    /// holds them.
    ///
    /// # Errors
    ///
    /// If the group is not there.
    pub fn entrances(&self) -> io::Result<Vec<File>> {
        // A thread that moves itself needs no lock of the kernel's on all threads of the host, which takes 10 to 20 ms
        // to get (kernel/cgroup/cgroup.c, `cgroup_procs_write_start`). Version 2 moves single threads only inside a
        // threaded group.
        let entrance = if self.is_unified { "cgroup.procs" } else { "tasks" };
        self.dirs.iter().map(|dir| OpenOptions::new().write(true).open(dir.join(entrance))).collect()
    }

    /// The processes of the VM; threads that the kernel has for it are none.
    ///
    /// # Errors
    ///
    /// If they cannot be listed. A group that is not there has none.
    pub fn processes(&self) -> io::Result<Vec<i32>> {
        let mut pids = Vec::new();
        for dir in &self.dirs {
            let text = match fs::read_to_string(dir.join("cgroup.procs")) {
                // ENODEV: it was removed while the file was open.
                Err(error)
                    if error.kind() == io::ErrorKind::NotFound
                        || error.raw_os_error() == Some(libc::ENODEV) =>
                {
                    continue;
                }
                text => text?,
            };
            pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
        }
        pids.retain(|pid| !is_of_kernel(*pid));
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// Ends every process of the VM. The group stays.
    ///
    /// # Errors
    ///
    /// If a process does not end in time.
    pub async fn kill(&self) -> io::Result<()> {
        self.kill_until(|| true).await
    }

    /// Ends every process of the VM, and removes the group.
    ///
    /// # Errors
    ///
    /// If a process does not end in time.
    pub async fn destroy(&self) -> io::Result<()> {
        self.kill_until(|| self.remove().is_ok()).await
    }

    /// Kills what is there until nothing is and `done` says so.
    async fn kill_until(&self, done: impl Fn() -> bool) -> io::Result<()> {
        let deadline = Instant::now() + EMPTY_WITHIN;
        let mut wait = Duration::from_millis(1);
        loop {
            let pids = self.processes()?;
            if pids.is_empty() && done() {
                return Ok(());
            }
            for pid in pids.into_iter().filter_map(Pid::from_raw) {
                // Zero is a process of another PID namespace, which cannot be here; Pid has no such value.
                let _ = kill_process(pid, Signal::KILL);
            }
            if Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            sleep(wait).await;
            wait = (wait * 2).min(Duration::from_millis(50));
        }
    }

    fn remove(&self) -> io::Result<()> {
        self.dirs.iter().try_for_each(|dir| remove_dir(dir))
    }

    /// Whether it lies in one tree with all controllers.
    pub fn is_unified(&self) -> bool {
        self.is_unified
    }
}

/// Whether `pid` is a thread of the kernel, such as the one that KVM has for each VM: it joins the group of whoever made the VM,
/// and ends with it.
fn is_of_kernel(pid: i32) -> bool {
    // PF_KTHREAD (include/linux/sched.h), in the ninth field; the second is a name in brackets (proc_pid_stat(5)).
    const KERNEL_THREAD: u32 = 0x0020_0000;
    let flags = |stat: String| stat.rsplit_once(')')?.1.split_whitespace().nth(6)?.parse::<u32>().ok();
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(flags)
        .is_some_and(|flags| flags & KERNEL_THREAD != 0)
}

fn set(dir: &Path, file: &str, value: &str) -> io::Result<()> {
    let path = dir.join(file);
    fs::write(&path, value).map_err(|error| {
        io::Error::new(error.kind(), format!("cannot write {value:?} to {}: {error}", path.display()))
    })
}

fn remove_dir(dir: &Path) -> io::Result<()> {
    match fs::remove_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, process::Command};

    use super::*;

    #[test]
    fn threads_of_the_kernel_are_told_from_processes() {
        assert!(!is_of_kernel(i32::try_from(std::process::id()).unwrap()));
        // The kernel's first, where it can be seen (kernel/kthread.c).
        let is_kthreadd = fs::read_to_string("/proc/2/comm").is_ok_and(|name| name.trim() == "kthreadd");
        assert_eq!(is_of_kernel(2), is_kthreadd);
        assert!(!is_of_kernel(i32::MAX));
    }

    #[tokio::test]
    async fn a_group_bounds_and_ends_its_processes() {
        let groups = Cgroups::find(&format!("test-{}", std::process::id())).unwrap();
        groups.prepare().unwrap();
        let group = groups.of("vm-1");
        group.create(Limits { memory_bytes: 64 << 20, cpu_millis: 500, pids: 8 }).unwrap();
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        for mut entrance in group.entrances().unwrap() {
            write!(entrance, "{}", child.id()).unwrap();
        }
        assert_eq!(group.processes().unwrap(), [i32::try_from(child.id()).unwrap()]);
        assert!(groups.existing().unwrap().contains(&"vm-1".to_owned()));
        assert!(groups.clean_up().is_err(), "a group in use stays");
        let waiter = std::thread::spawn(move || child.wait().unwrap());
        group.destroy().await.unwrap();
        group.destroy().await.unwrap();
        assert!(!waiter.join().unwrap().success());
        assert!(group.processes().unwrap().is_empty());
        groups.clean_up().unwrap();
        assert!(groups.existing().unwrap().is_empty());
    }
}
