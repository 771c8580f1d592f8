//! Templates: the directories under the image directory that `vmm-agent/templates/build` makes.

use std::{
    fs::{DirBuilder, Permissions},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use fs_err as fs;
use serde::Deserialize;
use tracing::warn;

use super::{durable, layer};

/// A template that this host can start. Its files never change: a new build lies in a directory of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    /// Its name.
    pub name: String,
    /// Digest of the recipe that it was built by.
    pub digest: String,
    /// Where it lies, without symbolic links.
    dir: PathBuf,
    /// Where its kernel and root filesystem lie: there, or where they were copied to.
    images: PathBuf,
}

const KERNEL: &str = "vmlinux";
const ROOTFS: &str = "rootfs.img";

#[derive(Deserialize)]
struct Manifest {
    template: String,
    digest: String,
}

impl Template {
    /// The kernel, uncompressed.
    pub fn kernel(&self) -> PathBuf {
        self.images.join(KERNEL)
    }

    /// The read-only root filesystem, ext4.
    pub fn rootfs(&self) -> PathBuf {
        self.images.join(ROOTFS)
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

    /// The same with its kernel and root filesystem on the filesystem of the directory `cache`: copied there, unless they are.
    ///
    /// # Errors
    ///
    /// If the disk does not take them.
    pub fn on_filesystem_of(mut self, cache: &Path) -> io::Result<Self> {
        if fs::metadata(cache)?.dev() == fs::metadata(&self.images)?.dev() {
            return Ok(self);
        }
        let target = self.copy_in(cache);
        if !target.try_exists()? {
            let draft = durable::draft_of(&target);
            durable::remove(&draft)?;
            DirBuilder::new().mode(0o711).create(&draft)?;
            for name in [KERNEL, ROOTFS] {
                let copy = layer::copy(&self.images.join(name), &draft.join(name))?;
                copy.set_permissions(Permissions::from_mode(0o444))?;
                copy.sync_all()?;
            }
            durable::rename(&draft, &target)?;
        }
        self.images = target;
        Ok(self)
    }

    /// Where its kernel and root filesystem are in `cache`, if they were copied.
    pub fn copy_in(&self, cache: &Path) -> PathBuf {
        cache.join(format!("template-{}-{}", self.name, self.digest))
    }

    fn read(path: &Path) -> io::Result<Self> {
        // What `NAME` links to now: a later build must not change what a VM is made of half-way.
        let dir = path.canonicalize()?;
        let manifest: Manifest = serde_json::from_slice(&fs::read(dir.join("manifest.json"))?)?;
        let images = dir.clone();
        let template = Self { name: manifest.template, digest: manifest.digest, dir, images };
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
    fn what_has_to_be_on_one_filesystem_is_copied_once() {
        let (images, cache) =
            (tempfile::tempdir_in("/dev/shm").unwrap(), tempfile::tempdir_in("/var/tmp").unwrap());
        build(&images.path().join("base"), "base");
        fs::write(images.path().join("base/vmlinux"), "kernel").unwrap();
        let template = find(images.path()).unwrap().remove(0);
        let stays = template.clone().on_filesystem_of(images.path()).unwrap();
        assert_eq!(stays, template);
        let copied = template.clone().on_filesystem_of(cache.path()).unwrap();
        assert!(copied.kernel().starts_with(cache.path()) && copied.rootfs().starts_with(cache.path()));
        assert_eq!(fs::read(copied.kernel()).unwrap(), b"kernel");
        assert_eq!((copied.pins(), copied.modules()), (template.pins(), template.modules()));
        // It is not looked at again.
        fs::remove_file(images.path().join("base/vmlinux")).unwrap();
        assert_eq!(template.on_filesystem_of(cache.path()).unwrap(), copied);
        assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 1, "no draft is left");
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
