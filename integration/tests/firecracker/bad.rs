//! What cannot work: it is told what and what to do, and nothing is left.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use oc_integration::prepared;
use oc_vmm_agent::driver::{
    firecracker::{Firecracker, Settings},
    vmm::{Extent, Memory, Start, VmmError},
};

use oc_integration::firecracker::{Bed, Saved, refused, settings};

/// A VM's state, saved, for others to be restored from.
async fn saved(bed: &Bed) -> (oc_integration::firecracker::Vm<'_>, Saved) {
    let origin = bed.vm("vm-origin");
    let (vm, place) = origin.boot_and_save("saved", Extent::All).await;
    origin.end_but_keep(&vm).await;
    (origin, place)
}

#[tokio::test]
async fn a_damaged_snapshot_is_told_and_never_goes_on() {
    let bed = Bed::new().await;
    let (origin, good) = saved(&bed).await;
    type Damage = (&'static str, fn(&Saved));
    let damages: [Damage; 7] = [
        ("state-byte", |place| overwrite(&place.state, 5000, b"?!")),
        ("state-short", |place| truncate(&place.state, 4096)),
        ("state-empty", |place| truncate(&place.state, 0)),
        ("state-other", |place| fs::write(&place.state, vec![7; 20_000]).unwrap()),
        ("memory-short", |place| truncate(&place.memory, 1 << 20)),
        ("memory-empty", |place| truncate(&place.memory, 0)),
        ("layer-gone", |_| {}),
    ];
    for (name, damage) in damages {
        let home = bed.vm(&format!("vm-{name}"));
        let place = home.copy_of(&good, "from");
        damage(&place);
        let vm = home.wait_for(&place).await;
        if name == "layer-gone" {
            // From its jail, where a VMM looks for it.
            fs::remove_file(home.home.dir().join("jail/firecracker").join(home.home.vm()).join("root/layer"))
                .unwrap();
        }
        let reason = refused_or_lost(vm.machine.load(&place.state).await);
        assert!(!reason.is_empty(), "{name}");
        // It is of no use then, and goes as any other.
        home.end().await;
    }
    origin.end().await;
}

/// The reason, or that the VMM ended over it.
fn refused_or_lost(result: Result<(), VmmError>) -> String {
    match result {
        Err(VmmError::Lost(error)) => error.to_string(),
        other => refused(other),
    }
}

fn overwrite(path: &Path, at: u64, bytes: &[u8]) {
    fs::OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

fn truncate(path: &Path, to: u64) {
    fs::OpenOptions::new().write(true).open(path).unwrap().set_len(to).unwrap();
}

#[tokio::test]
async fn what_is_missing_is_named() {
    let bed = Bed::new().await;
    let home = bed.vm("vm-1");
    fs::remove_file(home.home.layer()).unwrap();
    let (error, _) = home.launch(Memory::Anonymous, Start::Boot).await.unwrap_err();
    assert!(error.to_string().contains("layer.img"), "{error}");
    let other = bed.vm("vm-2");
    let nowhere = Memory::CopyOf(PathBuf::from("/nowhere/memory"));
    let (error, _) = other.launch(nowhere, Start::Paused).await.unwrap_err();
    assert!(error.to_string().contains("/nowhere/memory"), "{error}");
    // On another filesystem it cannot be lent.
    let elsewhere = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    let memory = Memory::CopyOf(elsewhere.path().to_owned());
    let (error, _) = other.launch(memory, Start::Paused).await.unwrap_err();
    assert!(error.to_string().contains("one filesystem"), "{error}");
    home.end().await;
    other.end().await;
}

/// A program of this name that does as the `script` says.
fn program(dir: &Path, name: &str, script: &str) -> PathBuf {
    let path = dir.join(name);
    // Never open for writing in this process: another test's child may have that until it is what it is to be, and what is
    // open for writing cannot be run.
    let mut install = Command::new("install")
        .args(["-m", "755", "/dev/stdin"])
        .arg(&path)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    write!(install.stdin.take().unwrap(), "#!/bin/sh\n{script}\n").unwrap();
    assert!(install.wait().unwrap().success());
    path
}

#[tokio::test]
async fn programs_that_will_not_do_are_refused_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let good = settings();
    let find = |settings: Settings| async { Firecracker::find(settings, false).await.unwrap_err() };
    let absent = Settings { firecracker: "/nowhere/firecracker".into(), ..good.clone() };
    let refusal = find(absent).await;
    assert!(refusal.contains("/nowhere/firecracker") && refusal.contains("install"), "{refusal}");
    let absent = Settings { jailer: "/nowhere/jailer".into(), ..good.clone() };
    assert!(find(absent).await.contains("/nowhere/jailer"));
    for (version, expected) in [("1.16.1", "1.15.1"), ("1.11.0", "1.12.1"), ("x", "no version")] {
        let firecracker = program(dir.path(), "firecracker", &format!("echo 'Firecracker v{version}'"));
        let refusal = find(Settings { firecracker, ..good.clone() }).await;
        assert!(refusal.contains(expected), "{refusal}");
    }
    // One of another release.
    let jailer = program(dir.path(), "jailer", "echo 'Jailer v1.13.1'");
    let refusal = find(Settings { jailer, ..good.clone() }).await;
    assert!(refusal.contains("1.13.1") && refusal.contains("one release"), "{refusal}");
    // A jailer starts nothing by another name.
    let renamed = dir.path().join("vmm");
    fs::copy(&good.firecracker, &renamed).unwrap();
    let refusal = find(Settings { firecracker: renamed, ..good.clone() }).await;
    assert!(refusal.contains("`firecracker`"), "{refusal}");
}

#[tokio::test]
async fn a_host_without_kvm_is_told_so() {
    // In a mount namespace of its own, where the device is another.
    for (device, expected) in [("/dev/null", "No such device"), ("", "No such file")] {
        let dir = tempfile::tempdir().unwrap();
        let hide = match device {
            "" => "mount -t tmpfs none /dev && mknod /dev/null c 1 3".to_owned(),
            // A character device that is none (Documentation/admin-guide/devices.txt: 240 and up are for local use).
            _ => format!("mknod {0}/kvm c 240 77 && mount --bind {0}/kvm /dev/kvm", dir.path().display()),
        };
        let agent = prepared::binaries().unwrap().join("oc-vmm-agent");
        let Settings { firecracker, jailer, .. } = settings();
        let command = format!(
            "{hide} && exec {} --vmm firecracker --firecracker {} --jailer {} --host-id no-kvm --data-dir {}/data \
             --store file://{2}/store.db --listen unix://{2}/agent.sock --image-dir {} --network off",
            agent.display(),
            firecracker.display(),
            jailer.display(),
            dir.path().display(),
            prepared::IMAGES,
        );
        let command = command.replace("file://{2}", &format!("file://{}", dir.path().display()));
        let output = Command::new("unshare").args(["--mount", "sh", "-c", &command]).output().unwrap();
        let said =
            String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        assert!(!output.status.success(), "{said}");
        assert!(
            said.contains("/dev/kvm") && said.contains(expected) && said.contains("--vmm qemu"),
            "{said}"
        );
    }
}

#[tokio::test]
async fn a_vmm_that_does_not_start_is_told_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let version =
        |rest: &str| format!("[ \"$1\" = --version ] && {{ echo 'Jailer v1.12.1'; exit; }}\n{rest}");
    let cases = [
        ("fails", "echo 'no room for a jail' >&2; exit 3", "exit status: 3", "no room for a jail"),
        ("ends", "exit 0", "ended at once", ""),
        // What it has started does not last.
        ("dies", "sleep 0.2 > /dev/null 2>&1 &", "ended at once", ""),
        // What it has started never listens.
        ("silent", "sleep 600 > /dev/null 2>&1 &", "api.sock", ""),
    ];
    for (name, script, expected, last_words) in cases {
        let jailer = program(dir.path(), &format!("jailer-{name}"), &version(script));
        let bed = Bed::with(Settings { jailer, ..settings() }).await;
        let home = bed.vm("vm-1");
        let (error, said) = home.launch(Memory::Anonymous, Start::Boot).await.unwrap_err();
        let error = format!("{error}");
        assert!(error.contains(expected) || name == "silent", "{name}: {error}");
        assert!(said.contains(last_words), "{name}: {said}");
        home.end().await;
    }
}

#[tokio::test]
async fn a_jail_for_which_there_is_no_room_is_told_and_leaves_nothing() {
    let bed = Bed::new().await;
    let home = bed.vm("vm-1");
    // Too small for the program's copy.
    let jail = home.home.dir().join("jail/firecracker/vm-1/root");
    fs::create_dir_all(&jail).unwrap();
    let bounded = Command::new("prlimit")
        .args(["--fsize=1048576", "--"])
        .arg(settings().jailer)
        .args(["--id", "vm-1", "--uid", "1879048999", "--gid", "1879048999", "--exec-file"])
        .arg(settings().firecracker)
        .arg("--chroot-base-dir")
        .arg(home.home.dir().join("jail"))
        .output()
        .unwrap();
    assert!(!bounded.status.success());
    // What is left of it is in nobody's way.
    let vm = home.boot().await;
    vm.process.kill().await.unwrap();
    home.end().await;
}
