//! Guests' memory on huge pages. The host's are set aside for the length of a test, and given back.

use std::fs;

use oc_integration::firecracker::{Bed, MEMORY_MB, refused, settings};
use oc_vmm_agent::{
    backend::Condition,
    driver::{
        firecracker::{Firecracker, Settings},
        vmm::Extent,
    },
};
use tokio::sync::{Mutex, MutexGuard};

const POOL: &str = "/proc/sys/vm/nr_hugepages";
/// Of one VM, and one to spare.
const PAGES: u64 = MEMORY_MB as u64 / 2 + 1;

/// One test at a time.
static TURN: Mutex<()> = Mutex::const_new(());

/// Huge pages that are free, and no more, for as long as it is there.
struct Pool {
    before: u64,
    _turn: MutexGuard<'static, ()>,
}

impl Pool {
    fn now(name: &str) -> u64 {
        let all = fs::read_to_string("/proc/meminfo").unwrap();
        let line = all.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().parse().unwrap()
    }

    async fn of(pages: u64) -> Self {
        let turn = TURN.lock().await;
        let before = Self::now("HugePages_Total:");
        let used = before - Self::now("HugePages_Free:");
        let pool = Self { before, _turn: turn };
        fs::write(POOL, (used + pages).to_string()).unwrap();
        assert_eq!(Self::now("HugePages_Free:"), pages, "the host has not so much memory in one piece");
        pool
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        fs::write(POOL, self.before.to_string()).unwrap();
    }
}

fn huge() -> Settings {
    Settings { huge_pages: true, ..settings() }
}

#[tokio::test]
async fn a_memory_of_huge_pages_is_restored_whole_and_asks_for_nothing_more() {
    let pool = Pool::of(PAGES).await;
    let bed = Bed::with(huge()).await;
    let (first, second, third) = (bed.vm("vm-1"), bed.vm("vm-2"), bed.vm("vm-3"));
    let (vm, golden) = first.boot_and_save("golden", Extent::Changed).await;
    first.end_but_keep(&vm).await;

    let from = second.copy_of(&golden, "from");
    let clone = second.wait_for(&from).await;
    clone.machine.load(&from.state).await.unwrap();
    let again = second.place("again");
    again.save(clone.machine.as_ref(), Extent::Changed).await.unwrap();
    let (was, is) = (fs::read(&from.memory).unwrap(), fs::read(&again.memory).unwrap());
    assert_eq!(was.len(), is.len());
    let pages = || was.chunks(4096).zip(is.chunks(4096));
    assert!(
        pages().filter(|(was, _)| was.iter().any(|byte| *byte != 0)).count() > 1000,
        "there was something"
    );
    // What tells the guest that it is another one (VMGenID) is changed by the restore.
    assert!(pages().filter(|(was, is)| was != is).count() <= 1);
    let pid = second.cgroup.processes().unwrap()[0];
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let kib = |name: &str| {
        let line = maps.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap()
    };
    assert!(kib("Private_Hugetlb:") > 0 && kib("Private_Hugetlb:") <= u64::from(MEMORY_MB) * 1024, "{maps}");
    clone.machine.resume().await.unwrap();
    clone.machine.pause().await.unwrap();
    assert_eq!(clone.machine.condition().await.unwrap(), Condition::Runs);

    // There is none for another one.
    let too_many = third.copy_of(&golden, "from");
    let none = third.wait_for(&too_many).await;
    let refusal = refused(none.machine.load(&too_many.state).await);
    assert!(refusal.contains("memory"), "{refusal}");
    for vm in [first, second, third] {
        vm.end().await;
    }
    drop(pool);
}

#[tokio::test]
async fn an_image_that_is_cut_short_is_refused() {
    let pool = Pool::of(PAGES).await;
    let bed = Bed::with(huge()).await;
    let (first, second) = (bed.vm("vm-1"), bed.vm("vm-2"));
    let (vm, golden) = first.boot_and_save("golden", Extent::Changed).await;
    first.end_but_keep(&vm).await;
    let from = second.copy_of(&golden, "from");
    let image = fs::OpenOptions::new().write(true).open(&from.memory).unwrap();
    image.set_len((u64::from(MEMORY_MB) << 20) - (2 << 20)).unwrap();
    let clone = second.wait_for(&from).await;
    let refusal = refused(clone.machine.load(&from.state).await);
    assert!(refusal.contains("not that of the image"), "{refusal}");
    for vm in [first, second] {
        vm.end().await;
    }
    drop(pool);
}

#[tokio::test]
async fn a_host_that_has_set_none_aside_is_told_what_to_do() {
    let _pool = Pool::of(0).await;
    // Others may use some.
    if Pool::now("HugePages_Total:") == 0 {
        let refusal = Firecracker::find(huge(), false).await.unwrap_err();
        assert!(refusal.contains("vm.nr_hugepages"), "{refusal}");
    }
}
