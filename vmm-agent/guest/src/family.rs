//! Who descends from a process: what it has started, in whatever group or session that is now.
//!
//! What an orphan's parent was, the kernel does not remember: this is asked for while the parents live.

use std::fs;

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// The processes that descend from one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Family(Vec<i32>);

impl Family {
    /// Those of `ancestor`, itself left out, as they are now. Blocks: it reads all of `/proc`.
    pub fn of(ancestor: i32) -> Self {
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pairs = entries.filter_map(|entry| {
            let id = entry.file_name().to_str()?.parse().ok()?;
            Some((id, parent(&fs::read_to_string(entry.path().join("stat")).ok()?)?))
        });
        Self(descendants(ancestor, &pairs.collect::<Vec<_>>()))
    }

    /// Signals each. One that has ended meanwhile is none.
    pub fn signal(&self, signal: Signal) {
        for &id in &self.0 {
            let _ = kill(Pid::from_raw(id), signal);
        }
    }
}

/// The parent's ID in `/proc/PID/stat` (proc(5)): the second field after the name, which may have anything in it.
fn parent(stat: &str) -> Option<i32> {
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// Everybody below `ancestor`, of processes and their parents.
fn descendants(ancestor: i32, pairs: &[(i32, i32)]) -> Vec<i32> {
    let mut found = vec![ancestor];
    let mut looked = 0;
    while let Some(&one) = found.get(looked) {
        looked += 1;
        // Each has one parent, and the whole is no snapshot: nobody is found twice all the same.
        for &(id, parent) in pairs {
            if parent == one && !found.contains(&id) {
                found.push(id);
            }
        }
    }
    found.split_off(1)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn everybody_below_is_found_and_nobody_else() {
        let pairs = [(2, 1), (3, 2), (4, 2), (5, 4), (6, 1), (7, 6), (8, 8)];
        assert_eq!(descendants(2, &pairs), [3, 4, 5]);
        assert!(descendants(5, &pairs).is_empty());
        assert!(descendants(8, &pairs).is_empty());
        assert_eq!(parent("4321 (a) b (c) S 17 4321 0"), Some(17));
        assert_eq!(parent("4321"), None);
    }

    #[test]
    fn who_has_left_the_group_is_of_the_family() {
        let script = "setsid sleep 1000 & echo $!; wait";
        let mut shell = Command::new("sh").args(["-c", script]).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        let mut out = std::io::BufReader::new(shell.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut out, &mut line).unwrap();
        let family = Family::of(i32::try_from(shell.id()).unwrap());
        assert_eq!(family, Family(vec![line.trim().parse().unwrap()]));
        family.signal(Signal::SIGKILL);
        shell.wait().unwrap();
    }
}
