//! Files that are a sandbox's memory and nothing else, by which one of its states is told from another.

use crate::rest::Sandbox;

/// Where they lie.
const PLACE: &str = "/dev/shm";

/// Gives `mib` of a sandbox's memory a new content: the file `name` of it.
///
/// # Errors
///
/// If it does not.
pub async fn change(sandbox: &Sandbox, name: &str, mib: u64) -> anyhow::Result<()> {
    // In place where there is one: the same pages are written again.
    let script =
        format!("head -c {mib}M /dev/urandom | dd of={PLACE}/{name} bs=64k conv=notrunc status=none");
    sandbox.run(&script).await.map(drop)
}

/// The digest of all that [`change`] has written.
///
/// # Errors
///
/// If it cannot be read.
pub async fn digest(sandbox: &Sandbox) -> anyhow::Result<String> {
    sandbox.run(&format!("cat {PLACE}/* | sha256sum")).await
}
