//! What a VMM has of its host: as little as can be.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use oc_integration::firecracker::Bed;

fn of(pid: i32, file: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{file}"))
}

/// A line of `/proc/PID/status`.
fn status(pid: i32, name: &str) -> String {
    let text = fs::read_to_string(of(pid, "status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name}:")));
    line.unwrap_or_default().trim().to_owned()
}

#[tokio::test]
async fn a_vmm_is_nobody_in_a_jail() {
    let bed = Bed::new().await;
    let (one, other) = (bed.vm("vm-1"), bed.vm("vm-2"));
    let (vm, _other) = (one.boot().await, other.boot().await);
    let [pid] = one.cgroup.processes().unwrap()[..] else { panic!("one process") };
    let [beside] = other.cgroup.processes().unwrap()[..] else { panic!("one process") };

    let uid = one.home.uid();
    assert_ne!(uid, other.home.uid());
    let ids = [uid.to_string(), uid.to_string(), uid.to_string(), uid.to_string()].join("\t");
    assert_eq!(
        (status(pid, "Uid"), status(pid, "Gid"), status(pid, "Groups")),
        (ids.clone(), ids, String::new())
    );
    for set in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
        assert_eq!(status(pid, set), "0".repeat(16), "{set}");
    }
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    // SECCOMP_MODE_FILTER (include/uapi/linux/seccomp.h), on every thread.
    for task in fs::read_dir(of(pid, "task")).unwrap() {
        let task = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let is_of_kvm = task.contains("Name:\tkvm-");
        assert!(is_of_kvm || task.contains("Seccomp:\t2"), "{task}");
    }
    for namespace in ["mnt", "pid", "net", "ipc"] {
        let link = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(link(&pid.to_string()), link("self"), "{namespace}");
        assert_ne!(link(&pid.to_string()), link(&beside.to_string()), "{namespace}");
    }
    // In its own it is the first process.
    assert!(status(pid, "NSpid").ends_with("\t1"), "{}", status(pid, "NSpid"));
    let limits = fs::read_to_string(of(pid, "limits")).unwrap();
    let limit = |name: &str| {
        limits
            .lines()
            .find(|line| line.starts_with(name))
            .unwrap()
            .split_whitespace()
            .nth_back(2)
            .unwrap()
            .to_owned()
    };
    assert_eq!((limit("Max open files"), limit("Max core file size")), ("2048".into(), "0".into()));
    assert_eq!(fs::read_to_string(of(pid, "oom_score_adj")).unwrap().trim(), "500");
    assert_eq!(fs::read_to_string(of(pid, "environ")).unwrap(), "", "nothing of the agent's environment");

    // All that it sees of the host's files.
    let root = of(pid, "root");
    let mut seen: Vec<_> = walk(&root, &root);
    seen.sort();
    let expected = [
        "api.sock",
        "base",
        "dev/kvm",
        "dev/net/tun",
        "dev/urandom",
        "dev/userfaultfd",
        "firecracker",
        "firecracker.pid",
        "guest.sock",
        "initramfs",
        "kernel",
        "layer",
        "metrics",
    ];
    // Only a kernel that has it as a device has one.
    seen.retain(|name| name != "dev/userfaultfd");
    assert_eq!(seen, expected.into_iter().filter(|name| *name != "dev/userfaultfd").collect::<Vec<_>>());
    let layer = fs::metadata(root.join("layer")).unwrap();
    assert_eq!(layer.ino(), fs::metadata(one.home.layer()).unwrap().ino(), "it is the agent's own file");
    assert_eq!(layer.uid(), uid);
    for name in ["kernel", "base", "initramfs"] {
        let file = fs::metadata(root.join(name)).unwrap();
        assert!(file.uid() == 0 && file.mode() & 0o022 == 0, "{name} is not its to write");
    }
    // And nobody else comes in.
    let jail = one.home.dir().join("jail");
    assert_eq!(fs::metadata(&jail).unwrap().mode() & 0o077, 0);
    vm.process.kill().await.unwrap();
    one.end().await;
    other.end().await;
}

/// What is no directory, from `root`.
fn walk(root: &Path, dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            found.extend(walk(root, &entry.path()));
        } else {
            found.push(entry.path().strip_prefix(root).unwrap().to_string_lossy().into_owned());
        }
    }
    found
}
