//! What the capture before has left in a VM's home for the next one to be laid over, so that a capture costs what has changed
//! since and not what has changed since the VM was started.
//!
//! ```text
//!   previous/memory.img       its image of the memory, by another name: it stays, whatever becomes of the snapshot
//!   previous/memory.digests     digests of it, or of one that differs from it in pages that are known
//!   previous/pages.bin        its pages that differ from the image
//!   previous/account.json     which pages they are, and which were taken and are in neither; removed before pages are taken,
//!                             and written anew when all of them are in files here
//!   previous-disk/            its disk and the digests of that, where disks share blocks
//! ```
//!
//! When a VM is paused the kernel's account of written pages is closed, and a new one begun ([`super::writes`]). What was in
//! the old one must not be lost: who fails to make a snapshot of it writes down which pages they were. If the agent dies
//! meanwhile there is no `account.json`, and the next capture takes everything that is the VM's own, as the first one does.
//! None of this survives the VM's process: what is started in the home begins with nothing.

use std::{
    fs::DirBuilder,
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use fs_err::{self as fs, File};
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::{
    digests::{Digests, Identity},
    durable,
    home::Home,
    pagemap_scan::Wanted,
    pages::{Pages, Run},
    runs,
    snapshot::digests_of,
    vmm::Extent,
};

const MEMORY: &str = "memory.img";
const PAGES: &str = "pages.bin";
const ACCOUNT: &str = "account.json";
const LAYER: &str = "layer.img";

/// What is known of the files.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Account {
    /// What the image was when it was put here: somebody may have written to it since.
    image: Identity,
    /// Likewise.
    pages_file: Identity,
    /// The pages that lie over the image.
    pages: Pages,
    /// Pages in which the image differs from what its digests are of.
    undigested: Vec<Run>,
    /// Pages that were taken since a snapshot that is kept, for others.
    unkept: Vec<Run>,
    /// Pages that were taken, and are not here as they were then.
    pending: Vec<Run>,
}

/// What a capture is laid over.
#[derive(Debug)]
pub struct Foundation {
    dir: PathBuf,
    /// The image of the memory, if there is one.
    pub image: Option<PathBuf>,
    /// Digests of the image, but for the pages `undigested`.
    pub digests: Option<PathBuf>,
    /// Pages in which the image differs from what its digests are of.
    pub undigested: Vec<Run>,
    /// The file with the pages that lie over the image.
    pub pages_file: Option<PathBuf>,
    /// Those pages.
    pub pages: Pages,
    /// Pages that were taken since a snapshot that is kept, for others.
    pub unkept: Vec<Run>,
    /// Pages that were taken before, and are missing here.
    pub pending: Vec<Run>,
    /// What can be given back to `account.json`.
    account: Option<Account>,
    /// Pages that were taken and are not settled.
    taken: Option<Vec<Run>>,
}

impl Foundation {
    /// Of the VM in `home`: what the capture before has left, if writes are remembered (`is_remembered`) and nothing has been
    /// lost since; else the image that the VM was started with.
    ///
    /// # Errors
    ///
    /// If what is of no use any more resists.
    pub fn of(home: &Home, is_remembered: bool) -> io::Result<Self> {
        let dir = home.previous();
        match read(&dir) {
            Ok(Some(account)) if is_remembered => {
                let image = dir.join(MEMORY);
                let digests = digests_of(&image);
                return Ok(Self {
                    digests: digests.try_exists()?.then_some(digests),
                    image: Some(image),
                    undigested: account.undigested.clone(),
                    pages_file: Some(dir.join(PAGES)),
                    pages: account.pages.clone(),
                    unkept: account.unkept.clone(),
                    pending: account.pending.clone(),
                    account: Some(account),
                    taken: None,
                    dir,
                });
            }
            Ok(_) => {}
            Err(error) => {
                warn!(dir = %dir.display(), %error, "what the capture before has left is of no use")
            }
        }
        durable::remove(&dir)?;
        let base = home.base();
        let digests = digests_of(&base);
        Ok(Self {
            dir,
            // Those of an image are there unless it was for use at once.
            digests: digests.try_exists()?.then_some(digests),
            image: base.try_exists()?.then_some(base),
            undigested: Vec::new(),
            pages_file: None,
            pages: Pages::default(),
            unkept: Vec::new(),
            pending: Vec::new(),
            account: None,
            taken: None,
        })
    }

    /// The foundation for a VM whose VMM writes its memory itself, and how much of it that is to write. It says what has
    /// changed since it was told to before: if that capture came to nothing, only all of it will do.
    ///
    /// # Errors
    ///
    /// If the home cannot be read or written.
    pub fn of_saved(home: &Home) -> io::Result<(Self, Extent)> {
        let mut foundation = Self::of(home, true)?;
        if foundation.account.is_some() || !home.is_account_closed()? {
            return Ok((foundation, Extent::Changed));
        }
        (foundation.image, foundation.digests) = (None, None);
        Ok((foundation, Extent::All))
    }

    /// Which of the VM's pages are not in it.
    pub fn wanted(&self) -> Wanted {
        match self.account {
            Some(_) => Wanted::Written,
            None => Wanted::Own,
        }
    }

    /// Says that the kernel's account is about to be closed: whoever finds things as they are now trusts it no more.
    ///
    /// # Errors
    ///
    /// If that cannot be written down.
    pub fn close_account(&self) -> io::Result<()> {
        durable::remove(&self.dir.join(ACCOUNT))
    }

    /// Says that it is damaged: the next capture takes everything.
    pub fn distrust(&mut self) {
        self.account = None;
        if let Err(error) = self.close_account() {
            warn!(dir = %self.dir.display(), %error, "what the capture before has left is damaged, and resists");
        }
    }

    /// Remembers what was in it.
    pub fn taken(&mut self, runs: &[Run]) {
        self.taken = Some(runs.to_vec());
    }

    /// Puts what was made of it in its place, for the next capture: the files in `draft`, with `pages` over the image. Of
    /// `digested` it has the digests there are, but for pages that are `undigested`.
    pub fn settle(mut self, draft: &Path, pages: &Pages, digested: Option<&Path>, changed: Changed) {
        let Some(taken) = self.taken.take() else { return };
        let put = || {
            let next = self.dir.with_extension("next");
            durable::remove(&next)?;
            DirBuilder::new().mode(0o700).create(&next)?;
            let (image, file) = (next.join(MEMORY), next.join(PAGES));
            fs::hard_link(draft.join(MEMORY), &image)?;
            fs::hard_link(draft.join(PAGES), &file)?;
            if let Some(digests) = digested {
                fs::hard_link(digests, digests_of(&image))?;
            }
            let account = Account {
                image: Identity::of(File::open(&image)?.file())?,
                pages_file: Identity::of(File::open(&file)?.file())?,
                pages: pages.clone(),
                undigested: changed.undigested,
                unkept: changed.unkept,
                pending: Vec::new(),
            };
            write(&next, &account)?;
            durable::remove_whole(&self.dir)?;
            fs::rename(&next, &self.dir)
        };
        if let Err(error) = put() {
            warn!(dir = %self.dir.display(), %error, "a capture leaves nothing for the next one");
            self.taken = Some(taken);
        }
    }
}

/// What a capture has changed.
#[derive(Debug, Default)]
pub struct Changed {
    /// Pages in which its image differs from what the digests are of.
    pub undigested: Vec<Run>,
    /// Pages that were taken since a snapshot that is kept.
    pub unkept: Vec<Run>,
}

impl Drop for Foundation {
    fn drop(&mut self) {
        // Of what was taken nothing has come.
        let (Some(taken), Some(account)) = (self.taken.take(), self.account.take()) else { return };
        let account = Account { pending: runs::union(&account.pending, &taken), ..account };
        if let Err(error) = write(&self.dir, &account) {
            warn!(dir = %self.dir.display(), %error, "the next capture takes all that was changed");
        }
    }
}

fn write(dir: &Path, account: &Account) -> io::Result<()> {
    let path = dir.join(ACCOUNT);
    let draft = durable::draft_of(&path);
    // It need not survive the machine: the VM does not.
    let written = fs::write(&draft, serde_json::to_vec(account)?).and_then(|()| fs::rename(&draft, &path));
    if written.is_err() {
        let _ = durable::remove(&draft);
    }
    written
}

/// What the account in `dir` says, if there is one and the files are those that it is of.
fn read(dir: &Path) -> io::Result<Option<Account>> {
    let text = match fs::read(dir.join(ACCOUNT)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text?,
    };
    let account: Account = serde_json::from_slice(&text)?;
    let is = |name: &str, expected: &Identity| -> io::Result<bool> {
        Ok(Identity::of(File::open(dir.join(name))?.file())? == *expected)
    };
    if !is(MEMORY, &account.image)? || !is(PAGES, &account.pages_file)? {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "its files were written to"));
    }
    Ok(Some(account))
}

/// The disk that the capture before has left in `home`, with its digests.
pub fn disk(home: &Home) -> Option<(File, Digests)> {
    let layer = home.previous_disk().join(LAYER);
    let digests = Digests::open(&digests_of(&layer)).ok()?;
    Some((File::open(&layer).ok()?, digests))
}

/// Keeps the disk `layer`, which is not written to any more, for the next capture of the VM in `home`; one that has no digests
/// beside it is of no use.
///
/// # Errors
///
/// If it cannot be linked; then none is kept.
pub fn keep_disk(home: &Home, layer: &Path) -> io::Result<()> {
    if !digests_of(layer).try_exists()? {
        return Ok(());
    }
    let (dir, next) = (home.previous_disk(), durable::draft_of(&home.previous_disk()));
    durable::remove(&next)?;
    durable::remove_whole(&dir)?;
    DirBuilder::new().mode(0o700).create(&next)?;
    let kept = next.join(LAYER);
    fs::hard_link(layer, &kept)?;
    fs::hard_link(digests_of(layer), digests_of(&kept))?;
    fs::rename(&next, &dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A home after a capture with one page beside its image.
    fn captured(dir: &Path) -> Home {
        let home = Home::of(dir, "vm-000000000001");
        fs::create_dir(home.dir()).unwrap();
        let draft = dir.join("draft");
        fs::create_dir(&draft).unwrap();
        let files = [(MEMORY, "image"), (PAGES, "pages"), ("memory.digests", "digests")];
        for (name, content) in files {
            fs::write(draft.join(name), content).unwrap();
        }
        let mut first = Foundation::of(&home, true).unwrap();
        assert_eq!((first.wanted(), &first.image), (Wanted::Own, &None));
        first.close_account().unwrap();
        first.taken(&[Run(7, 1)]);
        let pages = Pages { runs: vec![Run(7, 1)], sha256: None };
        first.settle(&draft, &pages, Some(&draft.join("memory.digests")), Changed::default());
        fs::remove_dir_all(&draft).unwrap();
        home
    }

    #[test]
    fn a_capture_is_laid_over_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let home = captured(dir.path());
        let next = Foundation::of(&home, true).unwrap();
        assert_eq!((next.wanted(), &next.pages.runs[..]), (Wanted::Written, &[Run(7, 1)][..]));
        assert_eq!(fs::read_to_string(next.image.as_ref().unwrap()).unwrap(), "image");
        assert!(next.pending.is_empty() && next.digests.is_some());
        // Looked at, and not used.
        drop(next);
        assert_eq!(Foundation::of(&home, true).unwrap().wanted(), Wanted::Written);
        // Where writes are not remembered it is worth nothing, now and later.
        assert_eq!(Foundation::of(&home, false).unwrap().wanted(), Wanted::Own);
        assert_eq!(Foundation::of(&home, true).unwrap().wanted(), Wanted::Own);
    }

    #[test]
    fn what_was_taken_for_nothing_is_taken_again() {
        let dir = tempfile::tempdir().unwrap();
        let home = captured(dir.path());
        for (number, pending) in [(1, vec![]), (2, vec![Run(1, 1)]), (3, vec![Run(1, 2)])] {
            let mut failed = Foundation::of(&home, true).unwrap();
            assert_eq!(failed.pending, pending);
            failed.close_account().unwrap();
            failed.taken(&[Run(number, 1)]);
        }
        assert_eq!(Foundation::of(&home, true).unwrap().pending, [Run(1, 3)]);
    }

    #[test]
    fn what_an_agent_was_about_to_take_when_it_died_is_not_trusted() {
        let dir = tempfile::tempdir().unwrap();
        let home = captured(dir.path());
        let dying = Foundation::of(&home, true).unwrap();
        dying.close_account().unwrap();
        // As little as a kill does, or a kernel that fails half-way.
        drop(dying);
        assert_eq!(Foundation::of(&home, true).unwrap().wanted(), Wanted::Own);
        assert!(!home.previous().exists());
    }

    #[test]
    fn a_vmm_that_has_told_its_changes_for_nothing_tells_all() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::of(dir.path(), "vm-000000000002");
        fs::create_dir(home.dir()).unwrap();
        fs::write(home.base(), "image").unwrap();
        let of = || Foundation::of_saved(&home).unwrap();
        let (first, extent) = of();
        assert_eq!((&first.image, extent), (&Some(home.base()), Extent::Changed));
        home.note_account_closed().unwrap();
        let (second, extent) = of();
        assert_eq!((&second.image, extent), (&None, Extent::All));
        // What is started there next has told nothing.
        home.forget_previous().unwrap();
        assert_eq!(of().1, Extent::Changed);
        let home = captured(dir.path());
        home.note_account_closed().unwrap();
        let (over, extent) = Foundation::of_saved(&home).unwrap();
        assert_eq!((&over.image, extent), (&Some(home.previous().join(MEMORY)), Extent::Changed));
    }

    #[test]
    fn an_image_that_was_written_to_is_not_built_on() {
        let dir = tempfile::tempdir().unwrap();
        for name in [MEMORY, PAGES] {
            let dir = dir.path().join(name);
            fs::create_dir(&dir).unwrap();
            let home = captured(&dir);
            fs::OpenOptions::new()
                .append(true)
                .open(home.previous().join(name))
                .and_then(|mut file| io::Write::write_all(&mut file, b"!"))
                .unwrap();
            assert_eq!(Foundation::of(&home, true).unwrap().wanted(), Wanted::Own, "{name}");
        }
    }
}
