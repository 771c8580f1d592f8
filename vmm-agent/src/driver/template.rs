//! Templates: the directories under the image directory that `vmm-agent/templates/build` makes.

use std::{
    io,
    path::{Path, PathBuf},
};

use fs_err as fs;
use serde::Deserialize;
use tracing::warn;

/// A template that this host can start. Its files never change: a new build lies in a directory of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    /// Its name.
    pub name: String,
    /// Digest of the recipe that it was built by.
    pub digest: String,
    /// Where it lies, without symbolic links.
    dir: PathBuf,
}

#[derive(Deserialize)]
struct Manifest {
    template: String,
    digest: String,
}

impl Template {
    /// The kernel, uncompressed.
    pub fn kernel(&self) -> PathBuf {
        self.dir.join("vmlinux")
    }

    /// The read-only root filesystem, ext4.
    pub fn rootfs(&self) -> PathBuf {
        self.dir.join("rootfs.img")
    }

    /// Where the kernel's modules lie, and `order`, which lists those that the guest loads.
    pub fn modules(&self) -> PathBuf {
        self.dir.join("modules")
    }

    /// The build of the template `name` that has this digest, in `image_dir`; `None` if it is not there, or not whole.
    pub fn of(image_dir: &Path, name: &str, digest: &str) -> Option<Self> {
        let found = Self::read(&image_dir.join(format!("{name}-{digest}"))).ok()?;
        (found.name == name && found.digest == digest).then_some(found)
    }

    /// Where those who need this build say so ([`super::pins`]).
    pub fn pins(&self) -> PathBuf {
        self.dir.join("pins")
    }

    fn read(path: &Path) -> io::Result<Self> {
        // What `NAME` links to now: a later build must not change what a VM is made of half-way.
        let dir = path.canonicalize()?;
        let manifest: Manifest = serde_json::from_slice(&fs::read(dir.join("manifest.json"))?)?;
        let template = Self { name: manifest.template, digest: manifest.digest, dir };
        for part in [template.kernel(), template.rootfs(), template.modules().join("order")] {
            fs::metadata(&part)?;
        }
        Ok(template)
    }
}

/// The templates in `image_dir`: each is an entry of the template's name. What is damaged is left out, and said.
///
/// # Errors
///
/// If the directory cannot be read. One that does not exist has no templates.
pub fn find(image_dir: &Path) -> io::Result<Vec<Template>> {
    let mut found = Vec::new();
    let entries = match fs::read_dir(image_dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        match Template::read(&path) {
            // Earlier and unfinished builds stand beside it under longer names.
            Ok(template) if path.file_name().is_some_and(|name| *name == *template.name) => {
                found.push(template)
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => {}
            Err(error) => warn!(path = %path.display(), %error, "this is no template"),
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn build(dir: &Path, name: &str) {
        fs::create_dir_all(dir.join("modules")).unwrap();
        fs::write(dir.join("manifest.json"), format!(r#"{{"template":"{name}","digest":"d"}}"#)).unwrap();
        for part in ["vmlinux", "rootfs.img", "modules/order"] {
            fs::write(dir.join(part), "").unwrap();
        }
    }

    #[test]
    fn finds_what_is_whole_and_called_by_its_name() {
        let images = tempfile::tempdir().unwrap();
        build(&images.path().join("base-1"), "base");
        std::os::unix::fs::symlink("base-1", images.path().join("base")).unwrap();
        build(&images.path().join("torn"), "torn");
        fs::remove_file(images.path().join("torn/rootfs.img")).unwrap();
        fs::write(images.path().join("stray"), "").unwrap();
        let found = find(images.path()).unwrap();
        assert_eq!(found.iter().map(|template| template.name.as_str()).collect::<Vec<_>>(), ["base"]);
        assert!(found[0].kernel().ends_with("base-1/vmlinux"), "{:?}", found[0]);
        assert!(find(&images.path().join("none")).unwrap().is_empty());
    }
}
