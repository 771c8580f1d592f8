//! Snapshots of a process that goes on writing, one after another.

use std::{
    os::unix::fs::FileExt as _,
    time::{Duration, SystemTime},
};

use super::*;
use crate::driver::{
    digests::Digests,
    mapped::Mapped,
    pages::PAGE,
    snapshot::{MEMORY, PAGES, STATE, digests_of},
};

/// Twice what a snapshot may have beside its image.
const MEMORY_PAGES: u32 = 8192;

/// A home in which a process has a private mapping of an image that has digests.
struct World {
    dir: tempfile::TempDir,
    home: Home,
    vm: Mapped,
    verified: Verified,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let home = Home::of(dir.path(), "vm-000000000001");
        home.create().unwrap();
        let image = File::create_new(home.base()).unwrap();
        image.file().write_all_at(&vec![1; 1 << 20], 5 << 20).unwrap();
        image.set_len(u64::from(MEMORY_PAGES) * PAGE).unwrap();
        Digests::of(image.file()).unwrap().write(&digests_of(&home.base())).unwrap();
        let origin = serde_json::json!({
            "snapshot_key": "", "template": "", "template_digest": "", "cpu_count": 1, "memory_mb": 32, "vmm": "",
            "processor": "", "initramfs_digest": "",
        });
        serde_json::from_value::<Origin>(origin).unwrap().write(&home).unwrap();
        let vm = Mapped::start(&home.base());
        Self { dir, home, vm, verified: Verified::default() }
    }

    fn place(&self, name: &str) -> Place {
        Place::at(self.dir.path().join(name))
    }

    /// As far as the pages are taken.
    fn take(&self, name: &str) -> Draft {
        let memory = Source::Process(self.vm.memory.clone());
        let mut draft = Draft::begin(&self.place(name), &self.home, Some(&memory), None).unwrap();
        let saving = draft.saving().unwrap().unwrap();
        assert_eq!(saving.memory(), None);
        fs::write(&saving.state, "devices").unwrap();
        draft.take(Some(&memory), None).unwrap();
        draft
    }

    fn publish(&self, draft: Draft, is_ephemeral: bool) -> Manifest {
        let circumstances = Circumstances {
            taken_at: SystemTime::now(),
            is_quiet: true,
            pause: Duration::ZERO,
            freeze: Duration::ZERO,
            is_ephemeral,
        };
        draft.publish(&self.home, circumstances, &self.verified).unwrap()
    }

    /// Takes one that is kept, and sees that it is whole and holds what is in memory now. Pages that count as changed.
    fn check(&self, name: &str) -> u64 {
        let manifest = self.publish(self.take(name), false);
        self.compare(name, &self.vm.content());
        manifest.memory_changed_bytes() / PAGE
    }

    fn compare(&self, name: &str, expected: &[u8]) {
        let place = self.place(name);
        let manifest = place.read().unwrap().unwrap();
        let bytes = place.verify_all().unwrap();
        assert!(bytes > 0 || manifest.circumstances.is_ephemeral);
        let dir = self.dir.path().join(name);
        assert_eq!(fs::read_to_string(dir.join(STATE)).unwrap(), "devices");
        assert_eq!(
            fs::read_dir(&dir).unwrap().count(),
            if manifest.circumstances.is_ephemeral { 4 } else { 5 }
        );
        // What a VM would map and load.
        let copy = tempfile::tempfile().unwrap();
        copy.write_all_at(&fs::read(dir.join(MEMORY)).unwrap(), 0).unwrap();
        let mut pages = File::open(dir.join(PAGES)).unwrap().into_file();
        manifest.memory.unwrap().pages.lay_over(&mut pages, &copy).unwrap();
        let mut found = vec![0; expected.len()];
        copy.read_exact_at(&mut found, 0).unwrap();
        assert!(found == expected, "{name} holds another memory");
    }

    fn is_own_image(&self, name: &str) -> bool {
        fs::metadata(self.dir.path().join(name).join(PAGES)).unwrap().len() == 0
    }
}

#[tokio::test]
async fn each_one_of_a_chain_holds_what_was_in_memory_then() {
    let mut world = World::new();
    world.vm.write(10, 20, 2);
    assert_eq!(world.check("first"), 20);
    assert!(!world.is_own_image("first"));
    // Some of those anew, and others; no more than that is taken.
    world.vm.write(25, 10, 3);
    assert_eq!(world.check("second"), 10);
    assert_eq!(world.check("nothing"), 0);
    // Too much to lie beside an image, and then little beside that one.
    world.vm.write(0, 5000, 4);
    assert_eq!(world.check("image"), 5000);
    assert!(world.is_own_image("image"));
    let then = world.vm.content();
    world.vm.write(4990, 20, 5);
    assert_eq!(world.check("beside"), 20);
    assert!(!world.is_own_image("beside"));
    // Enough with what lies beside it.
    world.vm.write(100, 4090, 6);
    assert_eq!(world.check("another"), 4090);
    assert!(world.is_own_image("another"));
    // What they are laid over may go, and is not written to.
    for name in ["first", "second", "nothing", "beside"] {
        world.place(name).remove().unwrap();
    }
    world.compare("image", &then);
    world.vm.write(1, 1, 7);
    assert_eq!(world.check("last"), 1);
}

#[tokio::test]
async fn what_is_for_use_at_once_counts_as_changed_still() {
    let mut world = World::new();
    world.vm.write(10, 20, 2);
    assert_eq!(world.check("first"), 20);
    for (first, pages) in [(0, 100), (500, 5000), (6000, 10)] {
        world.vm.write(first, pages, 3);
        let name = format!("brief-{first}");
        world.publish(world.take(&name), true);
        world.compare(&name, &world.vm.content());
        world.place(&name).remove().unwrap();
    }
    world.vm.write(6005, 10, 4);
    assert_eq!(world.check("kept"), 5115);
    world.vm.write(0, 1, 4);
    assert_eq!(world.check("after"), 1);
}

#[tokio::test]
async fn a_capture_that_fails_takes_nothing_away_from_the_next_one() {
    let mut world = World::new();
    world.vm.write(10, 20, 2);
    // The first one of all, and later ones, in each of the ways that a snapshot is put together.
    for round in 0..3 {
        for (first, pages) in [(40, 3), (60, 5000)] {
            world.vm.write(first, pages, 10 + round);
            drop(world.take("failed"));
        }
        world.vm.write(50, 1, 20 + round);
        let changed = world.check(&format!("round-{round}"));
        assert!((5004..5100).contains(&changed), "{changed}");
        world.vm.write(7000, 2, round);
        assert_eq!(world.check(&format!("next-{round}")), 2);
    }
    // An agent that died when it had taken pages: all that is the VM's own is taken.
    world.vm.write(300, 1, 30);
    let dying = world.take("dying");
    std::mem::forget(dying);
    fs::remove_dir_all(durable::draft_of(&world.dir.path().join("dying"))).unwrap();
    assert!(world.check("after") > 5000);
    world.vm.write(300, 1, 31);
    assert_eq!(world.check("again"), 1);
}

#[tokio::test]
async fn what_was_damaged_is_not_built_on() {
    let mut world = World::new();
    for (number, part) in (0..).zip([MEMORY, PAGES]) {
        world.vm.write(0, 5000, 2 + number);
        world.check(&format!("image-{number}"));
        world.vm.write(0, 2, 4 + number);
        let name = format!("damaged-{number}");
        world.check(&name);
        let file = fs::OpenOptions::new().write(true).open(world.dir.path().join(&name).join(part)).unwrap();
        file.file().write_all_at(b"damage", 2 * PAGE - 6).unwrap();
        drop(file);
        assert!(world.place(&name).verify_all().is_err());
        world.vm.write(5, 1, 9);
        assert!(world.check(&format!("next-{number}")) >= 5000, "{part}");
    }
}

/// A VMM that writes its memory itself, and tells each change once.
struct Teller {
    memory: Vec<u8>,
    changed: Vec<usize>,
}

impl Teller {
    fn write(&mut self, page: usize, byte: u8) {
        self.memory[page * PAGE as usize..][..PAGE as usize].fill(byte);
        self.changed.push(page);
    }

    fn save(&mut self, bed: &World, name: &str, wanted: Extent) -> Draft {
        let source = Source::Vmm { bytes: self.memory.len() as u64 };
        let mut draft = Draft::begin(&bed.place(name), &bed.home, Some(&source), None).unwrap();
        let saving = draft.saving().unwrap().unwrap();
        fs::write(&saving.state, "devices").unwrap();
        let SavedMemory { file, extent } = saving.memory().unwrap();
        assert_eq!(extent, wanted, "{name}");
        let file = std::fs::OpenOptions::new().write(true).open(file).unwrap();
        assert_eq!(file.metadata().unwrap().len(), self.memory.len() as u64, "{name}");
        let pages = match extent {
            Extent::All => (0..MEMORY_PAGES as usize).collect(),
            Extent::Changed => std::mem::take(&mut self.changed),
        };
        for page in pages {
            let at = page * PAGE as usize;
            file.write_all_at(&self.memory[at..][..PAGE as usize], at as u64).unwrap();
        }
        self.changed.clear();
        draft.take(Some(&source), None).unwrap();
        draft
    }

    /// Saves one that is kept, and sees that it is whole. Pages that count as changed.
    fn check(&mut self, bed: &World, name: &str, wanted: Extent) -> u64 {
        let draft = self.save(bed, name, wanted);
        let manifest = bed.publish(draft, false);
        let place = bed.place(name);
        place.verify_all().unwrap();
        assert!(fs::read(place.memory()).unwrap() == self.memory, "{name}");
        assert_eq!(manifest.pages_bytes(), 0, "all of it is in the image");
        manifest.memory_changed_bytes() / PAGE
    }
}

#[tokio::test]
async fn a_vmm_writes_what_has_changed_over_the_snapshot_before() {
    let bed = World::new();
    let mut vmm = Teller { memory: fs::read(bed.home.base()).unwrap(), changed: Vec::new() };
    vmm.write(3, 9);
    assert_eq!(vmm.check(&bed, "first", Extent::Changed), 1);
    vmm.write(3, 8);
    vmm.write(4000, 7);
    assert_eq!(vmm.check(&bed, "second", Extent::Changed), 2);
    // What it has told for nothing it does not tell again.
    vmm.write(5, 5);
    drop(vmm.save(&bed, "lost", Extent::Changed));
    vmm.write(6, 6);
    assert!(vmm.check(&bed, "whole", Extent::All) > 2);
    vmm.write(7, 7);
    assert_eq!(vmm.check(&bed, "over", Extent::Changed), 1);
}
