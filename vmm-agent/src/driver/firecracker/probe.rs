//! Whether a guest really boots under Firecracker here: that every call succeeds does not tell.

use std::{
    fs::File,
    io::{self, Seek as _, Write as _},
    os::fd::AsRawFd as _,
    path::Path,
};

use nix::sys::memfd::{MFdFlags, memfd_create};
use serde_json::json;
use tokio::process::Command;

use super::Settings;
use crate::driver::accelerator;

/// Boots `kernel` with no disk, which it gives up within a second. Our own kernel, so that it needs no jail.
///
/// # Errors
///
/// What keeps a guest from booting.
pub async fn boots(settings: &Settings, kernel: Option<&Path>) -> Result<(), String> {
    let kernel = accelerator::virtualises(kernel)?;
    let config = json!({
        "boot-source": { "kernel_image_path": kernel, "boot_args": "console=ttyS0 panic=-1 reboot=k pci=off" },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 256 },
        "drives": [],
    });
    let file = tempfile(&config.to_string()).map_err(|error| error.to_string())?;
    let mut firecracker = Command::new(&settings.firecracker);
    firecracker
        .args(["--no-api", "--level", "Error", "--config-file"])
        .arg(format!("/proc/self/fd/{}", file.as_raw_fd()));
    accelerator::comes_up(firecracker, "Firecracker").await
}

/// A file without a name, which a child inherits, with `content`.
fn tempfile(content: &str) -> io::Result<File> {
    let mut file = File::from(memfd_create(c"firecracker", MFdFlags::empty())?);
    file.write_all(content.as_bytes())?;
    file.rewind()?;
    Ok(file)
}
