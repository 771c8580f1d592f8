//! Where the things are that tests and benches use and do not make.

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};

/// The directory with the release binaries, found from the program that asks: `target/release/deps/NAME-DIGEST` for
/// a test, `target/release/NAME` for a program.
///
/// # Errors
///
/// If `make build` has not made them.
pub fn binaries() -> anyhow::Result<PathBuf> {
    let program = env::current_exe()?;
    let found = program.ancestors().skip(1).take(2).find(|directory| directory.join("oc").is_file());
    let Some(directory) = found else {
        bail!("there is no oc near {}: run `make build`", program.display());
    };
    for name in ["oc-scheduler", "oc-vmm-agent", "oc-gateway", "oc-init", "liboc_preload.so"] {
        if !directory.join(name).is_file() {
            bail!("there is no {name} in {}: run `make build`", directory.display());
        }
    }
    Ok(directory.to_owned())
}

/// A program that `tools/setup --test` has fetched, by its path in the cache.
///
/// # Errors
///
/// If it is not there.
pub fn tool(path: &str) -> anyhow::Result<PathBuf> {
    let cache = match env::var_os("XDG_CACHE_HOME") {
        Some(cache) => PathBuf::from(cache),
        None => Path::new(&env::var_os("HOME").context("HOME is not set")?).join(".cache"),
    };
    let tool = cache.join("opencomputer/tools").join(path);
    if !tool.is_file() {
        bail!("there is no {}: run `make setup-test`", tool.display());
    }
    Ok(tool)
}

/// The template that sandboxes are made from.
pub const IMAGES: &str = "/var/cache/opencomputer/images";
