//! A host whose disk fills up.

use std::{fs, path::PathBuf, process::Command, sync::Arc};

use anyhow::ensure;
use oc_integration::mesh::{Mesh, eventually, succeeded};
use serde_json::json;
use tempfile::TempDir;

const SIZE_MIB: u64 = 2048;
const RESERVE_MIB: &str = "300";

/// A filesystem of its own in a file; unmounted when dropped.
pub struct Disk {
    directory: TempDir,
}

impl Disk {
    pub fn mount(size_mib: u64) -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("oc-disk-")
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o711))
            .tempdir()?;
        let image = directory.path().join("image");
        fs::File::create(&image)?.set_len(size_mib << 20)?;
        let command = |program: &str, arguments: &[&str]| {
            let mut command = Command::new(program);
            command.args(arguments);
            command
        };
        let disk = Self { directory };
        fs::create_dir(disk.path())?;
        succeeded(command("mke2fs", &["-q", "-F", "-t", "ext4", &image.display().to_string()]))?;
        succeeded(command(
            "mount",
            &["-o", "loop", &image.display().to_string(), &disk.path().display().to_string()],
        ))?;
        Ok(disk)
    }

    pub fn path(&self) -> PathBuf {
        self.directory.path().join("mnt")
    }

    /// Takes all but `mib` of what anybody but root may write.
    pub fn leave(&self, mib: u64) -> anyhow::Result<()> {
        let ballast = self.path().join("ballast");
        let _ = fs::remove_file(&ballast);
        let stat = nix::sys::statvfs::statvfs(&self.path())?;
        let free = stat.blocks_available() * stat.fragment_size();
        let take = free.saturating_sub(mib << 20);
        let mut command = Command::new("fallocate");
        command.args(["-l", &take.to_string(), &ballast.display().to_string()]);
        succeeded(command).map(drop)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.path()).status();
    }
}

pub async fn a_full_host_takes_no_more_and_loses_nothing(_: Arc<()>) -> anyhow::Result<()> {
    let disk = Disk::mount(SIZE_MIB)?;
    let mesh = Mesh::start_in(
        Some(&disk.path().join("state")),
        &["--pool-size", "0"],
        &[("OC_DISK_RESERVE_MB", RESERVE_MIB)],
    )?;
    let sandbox = mesh.rest().create(json!({})).await?;
    sandbox.run("echo written > file").await?;

    disk.leave(100)?;
    assert_eq!(
        mesh.rest().post("/api/sandboxes", json!({})).await?.refusal(),
        (503, "HOST_DISK_FULL".into())
    );
    assert_eq!(sandbox.run("cat file").await?, "written\n", "those that run are not disturbed");

    // Now for real: what the sandbox writes finds no room on the host.
    disk.leave(0)?;
    let writing = {
        let sandbox = sandbox.clone();
        let script = "head -c 50000000 /dev/urandom > big && sync && sha256sum < big && echo survived";
        tokio::spawn(async move { sandbox.run_with(json!({ "cmd": script, "timeout": 300 })).await })
    };
    eventually("calls are told why the sandbox stands still", async || {
        let refusal = sandbox.exec(json!({ "cmd": "true", "timeout": 1 })).await?.refusal();
        ensure!(refusal == (503, "HOST_DISK_FULL".into()), "{refusal:?}");
        Ok(())
    })
    .await?;
    // Room again: it goes on where it was, and has lost nothing.
    fs::remove_file(disk.path().join("ballast"))?;
    let ran = writing.await??;
    assert!(ran.code == 0 && ran.stdout.ends_with("survived\n"), "{ran:?}");
    assert_eq!(
        sandbox.run("cat file; sha256sum < big").await?,
        format!("written\n{}\n", ran.stdout.lines().next().unwrap())
    );
    assert_eq!(
        sandbox.run("dmesg 2>/dev/null | grep -ci -e 'i/o error' -e 'ext4-fs error' || true").await?,
        "0\n"
    );
    let other =
        eventually("the host says that it has room", async || mesh.rest().create(json!({})).await).await?;
    other.delete().await?;
    sandbox.delete().await?;
    mesh.stop()
}

pub async fn a_disk_that_fills_up_amid_a_capture_leaves_nothing_of_it(_: Arc<()>) -> anyhow::Result<()> {
    let disk = Disk::mount(SIZE_MIB)?;
    let mesh = Mesh::start_in(
        Some(&disk.path().join("state")),
        &["--pool-size", "0", "--paused-for", "0"],
        &[("OC_DISK_RESERVE_MB", "20")],
    )?;
    let rest = mesh.rest();
    let sandbox = rest.create(json!({ "timeout": 0 })).await?;
    sandbox.run("head -c 250M /dev/urandom > /dev/shm/much; md5sum < /dev/shm/much > sum; sync").await?;
    // Enough to begin with.
    disk.leave(60)?;
    let snapshots = disk.path().join("state/agent/snapshots");
    let is_whole = "md5sum < /dev/shm/much | cmp - sum && echo whole";
    for (path, reasons) in [
        ("/checkpoints", ["CHECKPOINT_FAILED", "HOST_DISK_FULL"]),
        ("/fork", ["CHECKPOINT_FAILED", "HOST_DISK_FULL"]),
        ("/hibernate", ["HIBERNATION_FAILED", "HOST_DISK_FULL"]),
    ] {
        let body = json!({ "name": "none", "mode": "live" });
        let (_, reason) = rest.post(&sandbox.path(path), body).await?.refusal();
        ensure!(reasons.contains(&reason.as_str()), "{path}: {reason}");
        eventually("it goes on as it was", async || {
            ensure!(sandbox.run(is_whole).await? == "whole\n");
            Ok(())
        })
        .await?;
        assert_eq!(fs::read_dir(&snapshots)?.count(), 0, "{path}: a part of it is left");
    }
    assert_eq!(rest.get(&sandbox.path("/checkpoints")).await?.expect(200)?.json(), json!([]));
    fs::remove_file(disk.path().join("ballast"))?;
    let taken =
        rest.post(&sandbox.path("/checkpoints"), json!({ "name": "none" })).await?.expect(201)?.json();
    rest.delete(&format!("/api/checkpoints/{}", taken["id"].as_str().unwrap_or_default()))
        .await?
        .expect(204)?;
    rest.post(&sandbox.path("/hibernate"), json!({})).await?.expect(200)?;
    eventually("the host says that it has room, and it wakes", async || {
        ensure!(sandbox.run(is_whole).await? == "whole\n");
        Ok(())
    })
    .await?;
    sandbox.delete().await?;
    mesh.stop()
}
