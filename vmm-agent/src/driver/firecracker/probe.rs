//! Whether a guest really boots under Firecracker here: that every call succeeds does not tell.

use std::{path::Path, process::Stdio};

use serde_json::json;
use tokio::{process::Command, time::timeout};

use super::Settings;
use crate::driver::accelerator::{self, PANIC, PANICS_WITHIN};

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
    let output = Command::new(&settings.firecracker)
        .args(["--no-api", "--level", "Error", "--config-file"])
        .arg(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file)))
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    match timeout(PANICS_WITHIN, output).await {
        Err(_) => Err(format!("a kernel under Firecracker did not come up within {PANICS_WITHIN:?}")),
        Ok(Err(error)) => Err(format!("cannot run {}: {error}", settings.firecracker.display())),
        Ok(Ok(output)) if String::from_utf8_lossy(&output.stdout).contains(PANIC) => Ok(()),
        Ok(Ok(output)) => {
            let said = String::from_utf8_lossy(&output.stdout);
            Err(format!(
                "a kernel under Firecracker ended early: {}",
                said.lines().last().unwrap_or("without a message")
            ))
        }
    }
}

/// A file without a name, which a child inherits, with `content`.
fn tempfile(content: &str) -> std::io::Result<std::fs::File> {
    use std::io::{Seek as _, Write as _};
    let mut file = std::fs::File::from(nix::sys::memfd::memfd_create(
        c"firecracker",
        nix::sys::memfd::MFdFlags::empty(),
    )?);
    file.write_all(content.as_bytes())?;
    file.rewind()?;
    Ok(file)
}
