//! What a check finds.

use std::fmt::Display;

use oc_proto::v1::{HostCheck, HostCheckStatus, VmmKind};

/// What all VMMs need.
pub const BOTH: &[VmmKind] = &[VmmKind::Qemu, VmmKind::Firecracker];
/// What QEMU alone needs.
pub const QEMU: &[VmmKind] = &[VmmKind::Qemu];
/// What Firecracker alone needs.
pub const FIRECRACKER: &[VmmKind] = &[VmmKind::Firecracker];

/// How something is, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    status: HostCheckStatus,
    found: String,
    remedy: String,
}

impl Finding {
    /// As it should be, or neither good nor bad.
    pub fn ok(found: impl Display) -> Self {
        Self { status: HostCheckStatus::Ok, found: found.to_string(), remedy: String::new() }
    }

    /// Sandboxes run, but could be better off.
    pub fn warning(found: impl Display, remedy: impl Display) -> Self {
        Self { status: HostCheckStatus::Warning, found: found.to_string(), remedy: remedy.to_string() }
    }

    /// Sandboxes do not run.
    pub fn problem(found: impl Display, remedy: impl Display) -> Self {
        Self { status: HostCheckStatus::Problem, found: found.to_string(), remedy: remedy.to_string() }
    }

    /// Nobody can tell, and why.
    pub fn unknown(why: impl Display) -> Self {
        Self { status: HostCheckStatus::Unknown, found: why.to_string(), remedy: String::new() }
    }
}

/// The check called `id`. What could not be found out is an error on the way to the finding, and the finding itself here.
pub fn check(id: &str, title: &str, concerns: &[VmmKind], finding: Result<Finding, Finding>) -> HostCheck {
    let Finding { status, found, remedy } = finding.unwrap_or_else(|unknown| unknown);
    HostCheck {
        id: id.to_owned(),
        title: title.to_owned(),
        status: status.into(),
        found,
        remedy,
        concerns: concerns.iter().copied().map(i32::from).collect(),
    }
}
