//! Snapshots of plain files, a store in memory, and a store that dies.

use std::{
    fmt,
    os::unix::fs::FileExt as _,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use fs_err as fs;
use futures_util::{StreamExt as _, TryStreamExt as _, stream::BoxStream};
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt as _, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, memory::InMemory,
    path::Path,
};
use oc_mesh::clock::ManualClock;
use tempfile::TempDir;

use super::{
    ObjectError, Objects, Pace,
    chunk::{self, CHUNK, ChunkId},
    chunk_lists::ChunkLists,
    inventory::Inventory,
    upload::Local,
};
use crate::driver::{
    digests::Digests,
    snapshot::{Origin, digests_of},
};

const PACE: Pace = Pace {
    grace: Duration::from_secs(4000),
    settle: Duration::from_millis(20),
    sweep_every: Duration::from_secs(1000),
};

pub(in crate::driver) fn origin() -> Origin {
    Origin {
        snapshot_key: "k".into(),
        template: "base".into(),
        template_digest: "d".into(),
        cpu_count: 1,
        memory_mb: 1024,
        vmm: "QEMU".into(),
        processor: "p".into(),
        initramfs_digest: "i".into(),
        snapshot_format: None,
        host_kernel: None,
    }
}

/// A store that refuses puts from some moment on, as a host does that dies, or its network.
#[derive(Debug)]
struct Mortal {
    inner: Arc<InMemory>,
    puts_left: AtomicUsize,
}

impl fmt::Display for Mortal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("mortal")
    }
}

#[tonic::async_trait]
impl ObjectStore for Mortal {
    async fn put_opts(&self, at: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let left =
            self.puts_left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        left.map_err(|_| object_store::Error::Generic { store: "mortal", source: "it died".into() })?;
        self.inner.put_opts(at, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        at: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(at, options).await
    }

    async fn get_opts(&self, at: &Path, options: GetOptions) -> Result<GetResult> {
        self.inner.get_opts(at, options).await
    }

    fn delete_stream(&self, at: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(at)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

/// A host with a store that survives it.
struct Host {
    dir: TempDir,
    store: Arc<InMemory>,
    clock: ManualClock,
    objects: Objects,
    lists: ChunkLists,
}

impl Host {
    fn new() -> Self {
        let (dir, store) = (tempfile::tempdir().unwrap(), Arc::new(InMemory::new()));
        let clock = ManualClock::new(SystemTime::now());
        fs::create_dir(dir.path().join("lists")).unwrap();
        Self {
            lists: ChunkLists::in_directory(&dir.path().join("lists")),
            objects: Objects::of(store.clone(), Arc::new(clock.clone()), PACE),
            dir,
            store,
            clock,
        }
    }

    /// The same store, through which this host can put so many more objects.
    fn dies_after(&self, puts: usize) -> Objects {
        let mortal = Mortal { inner: self.store.clone(), puts_left: AtomicUsize::new(puts) };
        Objects::of(Arc::new(mortal), Arc::new(self.clock.clone()), PACE)
    }

    /// A snapshot with an image of three chunks, which it shares with all others, a disk of its own, and a hole in each.
    fn snapshot(&self, id: &str) -> Local {
        let dir = self.dir.path().join(id);
        fs::create_dir(&dir).unwrap();
        for (name, text) in [("memory.img", "image"), ("layer.img", id)] {
            let path = dir.join(name);
            let file = fs::OpenOptions::new().create_new(true).read(true).write(true).open(&path).unwrap();
            let file = file.into_file();
            file.set_len(20 * CHUNK + 100).unwrap();
            for at in [5, 3 * CHUNK + 7, 20 * CHUNK] {
                file.write_all_at(format!("{text} at {at}").as_bytes(), at).unwrap();
            }
            Digests::of(&file).unwrap().write(&digests_of(&path)).unwrap();
        }
        fs::write(dir.join("state.bin"), format!("state of {id}")).unwrap();
        fs::write(dir.join("manifest.json"), format!("manifest of {id}")).unwrap();
        fs::write(dir.join(".unfinished"), "none of it").unwrap();
        Local {
            snapshot_id: id.to_owned(),
            dir,
            origin: origin(),
            manifest_digest: format!("digest of {id}"),
        }
    }

    fn place(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    async fn upload(&self, local: &Local) -> Result<super::upload::Uploaded, ObjectError> {
        self.objects.upload(local, &self.lists, || true).await
    }

    async fn fetch(&self, id: &str, place: &str) -> Result<(), ObjectError> {
        let inventory = self.objects.inventory(id).await?;
        self.objects.fetch(&inventory, &self.place(place), &[]).await
    }

    async fn chunks(&self) -> Vec<Path> {
        let listed = self.store.list(Some(&Path::from(chunk::PREFIX)));
        listed.map_ok(|meta| meta.location).try_collect().await.unwrap()
    }
}

/// That `copy` has the files of `of`, and nothing else.
fn assert_same(copy: &std::path::Path, of: &std::path::Path) {
    let names = |dir| {
        let entries =
            fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = entries.filter(|name| !name.starts_with('.')).collect();
        names.sort();
        names
    };
    assert_eq!(names(copy), names(of));
    for name in names(of) {
        assert!(fs::read(copy.join(&name)).unwrap() == fs::read(of.join(&name)).unwrap(), "{name}");
    }
}

#[tokio::test]
async fn what_is_fetched_is_what_was_put_and_what_is_shared_is_put_once() {
    let host = Host::new();
    let (one, two) = (host.snapshot("cp-1"), host.snapshot("cp-2"));
    assert!(!host.objects.has(&one).await.unwrap());
    let first = host.upload(&one).await.unwrap();
    // Three chunks of each image, and one for each other file.
    assert_eq!((first.chunks, first.put), (10, 10));
    assert!(host.objects.has(&one).await.unwrap() && !host.objects.has(&two).await.unwrap());
    let second = host.upload(&two).await.unwrap();
    assert_eq!((second.chunks, second.put), (10, 6), "the image and its digests are there");
    assert_eq!(host.upload(&two).await.unwrap().put, 0);

    host.fetch("cp-1", "fetched").await.unwrap();
    assert_same(&host.place("fetched"), &one.dir);
    assert!(matches!(host.fetch("cp-3", "none").await, Err(ObjectError::NotFound(_))));
    let everything: u64 = host.objects.verify("cp-1").await.unwrap();
    assert!(everything > 4 * CHUNK, "{everything}");
    // Only the image that is the same is taken from a neighbour.
    let inventory = host.objects.inventory("cp-2").await.unwrap();
    host.objects.fetch(&inventory, &host.place("beside"), std::slice::from_ref(&one.dir)).await.unwrap();
    assert_same(&host.place("beside"), &two.dir);
    let inode = |dir: &str, name| {
        std::os::unix::fs::MetadataExt::ino(&fs::metadata(host.place(dir).join(name)).unwrap())
    };
    assert_eq!(inode("beside", "memory.img"), inode("cp-1", "memory.img"));
    assert_ne!(inode("beside", "layer.img"), inode("cp-1", "layer.img"));
}

#[tokio::test]
async fn an_upload_that_dies_at_any_put_is_never_served_and_is_finished_by_the_next() {
    for puts in 0..11 {
        let host = Host::new();
        let local = host.snapshot("cp-1");
        let died = host.dies_after(puts).upload(&local, &host.lists, || true).await;
        assert!(matches!(died, Err(ObjectError::Store(_))), "{puts}: {died:?}");
        assert!(matches!(host.fetch("cp-1", "early").await, Err(ObjectError::NotFound(_))), "{puts}");
        assert!(!host.objects.has(&local).await.unwrap(), "{puts}");
        let next = host.upload(&local).await.unwrap();
        assert!(next.put <= 10 - puts.min(10) && host.objects.has(&local).await.unwrap(), "{puts}: {next:?}");
        host.fetch("cp-1", "fetched").await.unwrap();
        assert_same(&host.place("fetched"), &local.dir);
    }
}

#[tokio::test]
async fn a_snapshot_that_is_removed_amid_its_upload_does_not_come_back() {
    let host = Host::new();
    let local = host.snapshot("cp-1");
    let looks = AtomicUsize::new(0);
    let refused =
        host.objects.upload(&local, &host.lists, || looks.fetch_add(1, Ordering::SeqCst) < 10).await;
    assert!(matches!(refused, Err(ObjectError::Unwanted)), "{refused:?}");
    assert!(matches!(host.objects.inventory("cp-1").await, Err(ObjectError::NotFound(_))));
    host.objects.remove("cp-1").await.unwrap();
    host.upload(&local).await.unwrap();
    host.objects.remove("cp-1").await.unwrap();
    assert!(matches!(host.fetch("cp-1", "none").await, Err(ObjectError::NotFound(_))));
}

#[tokio::test]
async fn damage_is_told_and_never_served() {
    let host = Host::new();
    let local = host.snapshot("cp-1");
    host.upload(&local).await.unwrap();
    for at in host.chunks().await {
        let whole = host.store.get(&at).await.unwrap().bytes().await.unwrap();
        let mut other = whole.to_vec();
        other[0] ^= 1;
        for damage in [Some(other), Some(whole[1..].to_vec()), Some(vec![0; CHUNK as usize + 1]), None] {
            match damage {
                Some(damage) => drop(host.store.put(&at, damage.into()).await.unwrap()),
                None => host.store.delete(&at).await.unwrap(),
            }
            assert!(matches!(host.fetch("cp-1", "fetched").await, Err(ObjectError::Damaged(_))), "{at}");
            assert!(matches!(host.objects.verify("cp-1").await, Err(ObjectError::Damaged(_))), "{at}");
            assert!(!host.place("fetched").exists() && !host.place(".fetched.draft").exists());
        }
        host.store.put(&at, whole.into()).await.unwrap();
    }
    host.objects.verify("cp-1").await.unwrap();
    host.store.put(&Inventory::path("cp-1"), "damaged".into()).await.unwrap();
    assert!(matches!(host.fetch("cp-1", "fetched").await, Err(ObjectError::Damaged(_))));
    // Whoever still has it puts it there anew.
    assert!(!host.objects.has(&local).await.unwrap());
    host.upload(&local).await.unwrap();
    host.fetch("cp-1", "fetched").await.unwrap();
}

#[tokio::test]
async fn what_is_damaged_here_is_not_put_there() {
    let host = Host::new();
    let (one, two) = (host.snapshot("cp-1"), host.snapshot("cp-2"));
    host.upload(&one).await.unwrap();
    for at in host.chunks().await {
        host.store.delete(&at).await.unwrap();
    }
    // Its chunks are remembered; what is in it is not what they were.
    let image = fs::OpenOptions::new().write(true).open(two.dir.join("memory.img")).unwrap().into_file();
    image.write_all_at(b"other", 5).unwrap();
    let refused = host.upload(&two).await;
    assert!(
        matches!(&refused, Err(ObjectError::Local(error)) if error.kind() == std::io::ErrorKind::InvalidData)
    );
    assert!(matches!(host.objects.inventory("cp-2").await, Err(ObjectError::NotFound(_))));
}

#[tokio::test]
async fn a_sweep_removes_what_no_snapshot_names_once_it_is_old() {
    let host = Host::new();
    let (one, two) = (host.snapshot("cp-1"), host.snapshot("cp-2"));
    host.upload(&one).await.unwrap();
    host.upload(&two).await.unwrap();
    host.objects.remove("cp-1").await.unwrap();
    let swept = host.objects.sweep().await.unwrap();
    assert_eq!((swept.chunks, swept.removed), (16, 0), "an upload may rely on them");
    host.clock.advance(PACE.grace + Duration::from_secs(60));
    let swept = host.objects.sweep().await.unwrap();
    assert_eq!((swept.chunks, swept.removed), (16, 6));
    assert_eq!(host.objects.sweep().await.unwrap().removed, 0);
    host.fetch("cp-2", "fetched").await.unwrap();
    assert_same(&host.place("fetched"), &two.dir);
    // What is old is put anew by who relies on it.
    let again = host.upload(&one).await.unwrap();
    assert_eq!((again.chunks, again.put), (10, 6));
    host.fetch("cp-1", "first").await.unwrap();
}

#[tokio::test]
async fn a_sweep_that_cannot_tell_what_is_named_removes_nothing() {
    let host = Host::new();
    let (one, two) = (host.snapshot("cp-1"), host.snapshot("cp-2"));
    host.upload(&one).await.unwrap();
    host.upload(&two).await.unwrap();
    host.objects.remove("cp-2").await.unwrap();
    host.clock.advance(PACE.grace + Duration::from_secs(60));
    host.store.put(&Inventory::path("cp-1"), "damaged".into()).await.unwrap();
    assert!(matches!(host.objects.sweep().await, Err(ObjectError::Damaged(_))));
    assert_eq!(host.chunks().await.len(), 16);
}

#[tokio::test]
async fn one_host_sweeps_for_all() {
    let host = Host::new();
    let sweeps = futures_util::stream::iter(0..8).map(|_| host.objects.sweep_if_due());
    let swept: Vec<_> = sweeps.buffer_unordered(8).try_collect().await.unwrap();
    assert_eq!(swept.iter().flatten().count(), 1);
    assert!(host.objects.sweep_if_due().await.unwrap().is_none());
    for _ in 0..2 {
        host.clock.advance(PACE.sweep_every + Duration::from_secs(60));
        assert!(host.objects.sweep_if_due().await.unwrap().is_some());
        let marks = host.store.list(Some(&Path::from("sweeps"))).count().await;
        assert_eq!(marks, 1);
    }
}

#[tokio::test]
async fn a_store_is_named_once() {
    let host = Host::new();
    let id = host.objects.id().await.unwrap();
    assert_eq!(host.objects.id().await.unwrap(), id);
    assert_ne!(Host::new().objects.id().await.unwrap(), id);
}

#[tokio::test]
async fn a_directory_is_a_store_for_its_owner_alone() {
    let host = Host::new();
    let url = format!("file://{}", host.place("objects").display());
    let objects = Objects::open(&url, Arc::new(host.clock.clone())).unwrap();
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&fs::metadata(host.place("objects")).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o700);
    let local = host.snapshot("cp-1");
    objects.upload(&local, &host.lists, || true).await.unwrap();
    // Another process.
    let again = Objects::open(&url, Arc::new(host.clock.clone())).unwrap();
    assert_eq!(again.id().await.unwrap(), objects.id().await.unwrap());
    let inventory = again.inventory("cp-1").await.unwrap();
    again.fetch(&inventory, &host.place("fetched"), &[]).await.unwrap();
    assert_same(&host.place("fetched"), &local.dir);
    let id: ChunkId = inventory.chunks().next().unwrap();
    assert!(host.place("objects").join(id.path().to_string()).is_file());
    again.remove("cp-1").await.unwrap();
    again.remove("cp-1").await.unwrap();
    assert!(matches!(objects.inventory("cp-1").await, Err(ObjectError::NotFound(_))));
}
