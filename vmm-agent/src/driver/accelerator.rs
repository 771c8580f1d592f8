//! What runs the guests' instructions here: hardware virtualisation if it really does, else software emulation.

use std::{io, path::Path, process::Stdio, time::Duration};

use tokio::{process::Command, time::timeout};
use tracing::info;

use super::qemu::{Accelerator, PROGRAM};
use crate::config::AcceleratorChoice;

/// A kernel that really runs on hardware gives up its missing root filesystem within a second.
pub const PANICS_WITHIN: Duration = Duration::from_secs(5);
/// What it says then (`mount_root_generic` and `panic` in Linux).
pub const PANIC: &str = "Kernel panic";

/// Decides, and says why in the log.
///
/// # Errors
///
/// If hardware virtualisation is asked for and does not work.
pub async fn choose(choice: AcceleratorChoice, kernel: Option<&Path>) -> io::Result<Accelerator> {
    if choice == AcceleratorChoice::Tcg {
        info!(accelerator = "tcg", reason = "chosen by configuration", "accelerator");
        return Ok(Accelerator::Tcg);
    }
    match (probe(kernel).await, choice) {
        (Ok(()), _) => {
            info!(accelerator = "kvm", reason = "a kernel booted under it", "accelerator");
            Ok(Accelerator::Kvm)
        }
        (Err(reason), AcceleratorChoice::Kvm) => {
            Err(io::Error::other(format!("hardware virtualisation does not work here: {reason}")))
        }
        (Err(reason), _) => {
            info!(accelerator = "tcg", reason, "accelerator");
            Ok(Accelerator::Tcg)
        }
    }
}

/// Whether this host says that it has hardware virtualisation. That it makes guests go on is another thing, for which `kernel` is
/// what a template brings to try it with.
///
/// # Errors
///
/// What it lacks.
pub fn virtualises(kernel: Option<&Path>) -> Result<&Path, String> {
    if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        return Err(format!("/dev/kvm cannot be opened: {error}"));
    }
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").map_err(|error| error.to_string())?;
    if !has_virtualisation(&cpuinfo) {
        return Err("the processor shows neither VMX nor SVM".into());
    }
    kernel.ok_or_else(|| "no template brings a kernel to try it with".into())
}

/// Whether a guest makes progress under QEMU with KVM: the device alone does not tell. Takes some seconds at most.
///
/// # Errors
///
/// Why it is not known to.
pub async fn probe(kernel: Option<&Path>) -> Result<(), String> {
    let kernel = virtualises(kernel)?;
    let output = Command::new(PROGRAM)
        .args(["-machine", "microvm,acpi=on", "-accel", "kvm", "-cpu", "host", "-m", "256M", "-kernel"])
        .arg(kernel)
        .args(["-append", "console=ttyS0 panic=-1 reboot=t", "-serial", "stdio", "-display", "none"])
        .args(["-nodefaults", "-no-user-config", "-no-reboot"])
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    match timeout(PANICS_WITHIN, output).await {
        Err(_) => Err(format!("a kernel under KVM did not come up within {PANICS_WITHIN:?}")),
        Ok(Err(error)) => Err(format!("cannot run {PROGRAM}: {error}")),
        Ok(Ok(output)) if String::from_utf8_lossy(&output.stdout).contains(PANIC) => Ok(()),
        Ok(Ok(output)) => Err(format!(
            "a kernel under KVM ended early: {}",
            String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or("without a message")
        )),
    }
}

fn has_virtualisation(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().filter(|line| line.starts_with("flags")).flat_map(str::split_whitespace);
    flags.into_iter().any(|flag| flag == "vmx" || flag == "svm")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_processors_flags() {
        assert!(has_virtualisation("model name\t: x\nflags\t\t: fpu svm sse\n"));
        assert!(has_virtualisation("flags : vmx"));
        assert!(!has_virtualisation("flags : fpu\nvmx flags\t: ept\n"));
    }

    #[tokio::test]
    async fn emulation_needs_no_probe() {
        assert_eq!(choose(AcceleratorChoice::Tcg, None).await.unwrap(), Accelerator::Tcg);
    }
}
