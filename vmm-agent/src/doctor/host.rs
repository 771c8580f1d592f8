//! A view of a machine: its files below some directory, and the programs that are found in some others.

use std::{
    env,
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::{process::Command, time::timeout};

use super::finding::Finding;
use crate::config::{found_in, is_program};

/// The kernel's own files are small; `/proc/cpuinfo` of a large machine is some hundred KiB.
const MOST_BYTES: u64 = 8 << 20;
/// How long a program may take to say its version on a busy host.
const PROGRAM_WITHIN: Duration = Duration::from_secs(20);
/// As many sandboxes as the agent takes by itself: one for so many MiB of the host's memory.
const MB_PER_SANDBOX: u64 = 128;

/// A machine, as it is seen from `root`.
#[derive(Clone, Debug)]
pub struct Host {
    root: PathBuf,
    programs: Vec<PathBuf>,
}

impl Host {
    /// The machine that this program runs on, with the programs in its `PATH`.
    pub fn here() -> Self {
        let programs = env::var_os("PATH").map(|path| env::split_paths(&path).collect());
        Self { root: PathBuf::from("/"), programs: programs.unwrap_or_default() }
    }

    /// One that is made up: its files are below `root`, its programs in `root`'s `bin`.
    #[cfg(test)]
    pub fn made_up(root: &Path) -> Self {
        Self { root: root.to_owned(), programs: vec![root.join("bin")] }
    }

    /// Where the machine's `path` is, with or without its first slash.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// What a file of the kernel's says, without white space around it.
    ///
    /// # Errors
    ///
    /// The finding that it cannot be read.
    pub fn read(&self, path: &str) -> Result<String, Finding> {
        self.try_read(path).map_err(|error| Finding::unknown(format!("cannot read /{path}: {error}")))
    }

    /// As [`Self::read`], for who knows what it means that the file is not there.
    ///
    /// # Errors
    ///
    /// Of the kernel.
    pub fn try_read(&self, path: &str) -> io::Result<String> {
        let mut bytes = Vec::new();
        File::open(self.path(path))?.take(MOST_BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    /// The number that a file of the kernel's says.
    ///
    /// # Errors
    ///
    /// The finding that it says none.
    pub fn number(&self, path: &str) -> Result<u64, Finding> {
        let text = self.read(path)?;
        text.parse().map_err(|_| Finding::unknown(format!("/{path} says {text:?}, which is no number")))
    }

    /// Whether there is a file.
    pub fn has(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    /// Major and minor version of its kernel.
    ///
    /// # Errors
    ///
    /// The finding that it does not say.
    pub fn kernel(&self) -> Result<(u32, u32), Finding> {
        let release = self.read("proc/sys/kernel/osrelease")?;
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
            _ => Err(Finding::unknown(format!("the kernel calls itself {release:?}"))),
        }
    }

    /// Sandboxes that the agent takes by itself on a machine with so much memory.
    ///
    /// # Errors
    ///
    /// The finding that it does not say how much that is.
    pub fn sandboxes(&self) -> Result<u64, Finding> {
        let table = self.read("proc/meminfo")?;
        let total = table.lines().find_map(|line| line.strip_prefix("MemTotal:"));
        let kib = total.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        let kib = kib.ok_or_else(|| Finding::unknown("/proc/meminfo has no MemTotal"))?;
        Ok(kib / 1024 / MB_PER_SANDBOX)
    }

    /// A program: a path, or a name that is looked for.
    pub fn program(&self, named: &Path) -> Option<PathBuf> {
        if named.components().count() > 1 {
            return Some(self.path(named)).filter(|program| is_program(program));
        }
        found_in(self.programs.iter().cloned(), named)
    }

    /// Runs a program of this machine, and answers with what it prints.
    ///
    /// # Errors
    ///
    /// What it complains of, on one line.
    pub async fn run(&self, program: &Path, arguments: &[&str]) -> Result<String, String> {
        let output = Command::new(program).args(arguments).stdin(Stdio::null()).kill_on_drop(true).output();
        match timeout(PROGRAM_WITHIN, output).await {
            Err(_) => Err(format!("{} says nothing for {PROGRAM_WITHIN:?}", program.display())),
            Ok(Err(error)) => Err(format!("cannot run {}: {error}", program.display())),
            Ok(Ok(output)) if output.status.success() => {
                Ok(String::from_utf8_lossy(&output.stdout).into_owned())
            }
            Ok(Ok(output)) => {
                let complaint = String::from_utf8_lossy(&output.stderr);
                let line =
                    complaint.lines().find(|line| !line.trim().is_empty()).unwrap_or("it says nothing");
                Err(format!("{} fails: {}", program.display(), line.trim()))
            }
        }
    }
}

/// A directory with what tests need of a machine.
#[cfg(test)]
pub mod made_up {
    use std::io::Write as _;

    use fs_err as fs;

    use super::*;

    /// A machine that tests make up.
    #[derive(Debug)]
    pub struct Machine {
        root: tempfile::TempDir,
    }

    impl Machine {
        /// One with these files.
        pub fn with<'a>(files: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
            let machine = Self { root: tempfile::tempdir().unwrap() };
            for (path, text) in files {
                machine.write(path, text);
            }
            machine
        }

        /// Puts a file there.
        pub fn write(&self, path: &str, text: &str) {
            let path = self.root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        /// Puts a program there that is a shell script.
        pub fn program(&self, name: &str, script: &str) {
            let path = self.root.path().join("bin").join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            // Never open for writing in this process: another test's child may have that until it is what it is to be, and
            // what is open for writing cannot be run.
            let mut install = std::process::Command::new("install")
                .args(["-m", "755", "/dev/stdin"])
                .arg(path)
                .stdin(Stdio::piped())
                .spawn()
                .unwrap();
            write!(install.stdin.take().unwrap(), "#!/bin/sh\n{script}\n").unwrap();
            assert!(install.wait().unwrap().success());
        }

        /// Where it is.
        pub fn root(&self) -> &Path {
            self.root.path()
        }

        /// The view of it.
        pub fn host(&self) -> Host {
            Host::made_up(self.root.path())
        }
    }
}

#[cfg(test)]
mod tests {
    use oc_proto::v1::HostCheckStatus;

    use super::{super::finding::check, made_up::Machine, *};

    #[test]
    fn what_cannot_be_read_is_unknown_and_says_why() {
        let machine = Machine::with([("proc/sys/vm/x", "many\n")]);
        for path in ["proc/sys/vm/x", "proc/sys/vm/y"] {
            let told =
                check("x", "X", super::super::finding::BOTH, machine.host().number(path).map(Finding::ok));
            assert_eq!(told.status(), HostCheckStatus::Unknown);
            assert!(told.found.contains(path), "{}", told.found);
        }
    }

    #[test]
    fn kernels_and_capacities_are_read() {
        let machine = Machine::with([
            ("proc/sys/kernel/osrelease", "6.1.0-40-cloud-amd64\n"),
            ("proc/meminfo", "MemFree: 1 kB\nMemTotal:       16777216 kB\n"),
        ]);
        assert_eq!(machine.host().kernel(), Ok((6, 1)));
        assert_eq!(machine.host().sandboxes(), Ok(128));
        machine.write("proc/sys/kernel/osrelease", "hurd");
        assert!(machine.host().kernel().is_err());
    }

    #[tokio::test]
    async fn programs_are_found_and_run() {
        let machine = Machine::with([("bin/data", "")]);
        machine.program("says", "echo it; exit 0");
        machine.program("fails", "echo; echo no >&2; exit 3");
        let host = machine.host();
        assert_eq!(host.program(Path::new("data")), None);
        let says = host.program(Path::new("says")).unwrap();
        assert_eq!(host.program(Path::new("/bin/says")), Some(says.clone()));
        assert_eq!(host.run(&says, &[]).await, Ok("it\n".to_owned()));
        let refusal = host.run(&host.program(Path::new("fails")).unwrap(), &[]).await.unwrap_err();
        assert!(refusal.ends_with("fails: no"), "{refusal}");
    }
}
