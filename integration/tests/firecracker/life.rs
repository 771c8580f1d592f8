//! A VM's life: booted, paused, saved, loaded into another process, let go on, ended.

use std::{fs, os::unix::fs::MetadataExt as _, time::Duration};

use futures_util::future::join_all;
use oc_vmm_agent::{
    backend::Condition,
    driver::vmm::{Extent, Memory, Start, Vmm as _},
};
use tokio::time::timeout;

use oc_integration::firecracker::{Bed, MEMORY_MB, Vm, refused};

const BYTES: u64 = (MEMORY_MB as u64) << 20;

#[tokio::test]
async fn a_vm_is_saved_and_goes_on_in_another_process() {
    let bed = Bed::new().await;
    let (first, second) = (bed.vm("vm-1"), bed.vm("vm-2"));
    let vm = first.boot().await;
    assert_eq!(vm.machine.condition().await.unwrap(), Condition::Runs);
    vm.machine.pause().await.unwrap();
    // Twice is once.
    vm.machine.pause().await.unwrap();
    let golden = first.place("golden");
    golden.save(vm.machine.as_ref(), Extent::Changed).await.unwrap();
    assert_eq!(fs::metadata(&golden.memory).unwrap().len(), BYTES);
    assert!(golden.allocated() < BYTES, "what it has never touched is a hole");
    // It is not disturbed by that.
    vm.machine.resume().await.unwrap();
    vm.machine.resume().await.unwrap();
    assert_eq!(vm.machine.condition().await.unwrap(), Condition::Runs);
    vm.process.kill().await.unwrap();

    let from = second.copy_of(&golden, "from");
    let clone = second.wait_for(&from).await;
    clone.machine.load(&from.state).await.unwrap();
    let whole = fs::read(&from.memory).unwrap();
    clone.machine.resume().await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    clone.machine.pause().await.unwrap();
    assert!(fs::read(&from.memory).unwrap() == whole, "nobody writes to what a clone maps");
    // Only what it has changed.
    let changed = second.place("changed");
    changed.save(clone.machine.as_ref(), Extent::Changed).await.unwrap();
    assert!(changed.allocated() < golden.allocated(), "{} bytes", changed.allocated());
    // Nothing has changed since then but what the devices' own queues are for.
    let again = second.place("again");
    again.save(clone.machine.as_ref(), Extent::Changed).await.unwrap();
    assert!(again.allocated() <= changed.allocated());
    // All of it is all of it, and over a copy what has changed makes the same.
    let all = second.place("all");
    all.save(clone.machine.as_ref(), Extent::All).await.unwrap();
    let mut over = whole;
    for part in [&changed, &again] {
        lay_over(&mut over, &fs::read(&part.memory).unwrap());
    }
    let all = fs::read(&all.memory).unwrap();
    let differing = over.chunks(4096).zip(all.chunks(4096)).filter(|(one, other)| one != other);
    assert_eq!(differing.count(), 0);
    first.end().await;
    second.end().await;
}

/// Pages that are not zero over others: what a guest has cleared since is not looked at, which this guest has not.
fn lay_over(whole: &mut [u8], part: &[u8]) {
    for (to, from) in whole.chunks_mut(4096).zip(part.chunks(4096)) {
        if from.iter().any(|byte| *byte != 0) {
            to.copy_from_slice(from);
        }
    }
}

#[tokio::test]
async fn what_is_saved_over_a_copy_is_whole() {
    let bed = Bed::new().await;
    let (first, second, third) = (bed.vm("vm-1"), bed.vm("vm-2"), bed.vm("vm-3"));
    let (_vm, golden) = first.boot_and_save("golden", Extent::Changed).await;
    let from = second.copy_of(&golden, "from");
    let clone = second.wait_for(&from).await;
    clone.machine.load(&from.state).await.unwrap();
    clone.machine.resume().await.unwrap();
    clone.machine.pause().await.unwrap();
    let over = second.copy_of(&golden, "over");
    over.save(clone.machine.as_ref(), Extent::Changed).await.unwrap();
    let into = third.copy_of(&over, "into");
    let grandchild = third.wait_for(&into).await;
    grandchild.machine.load(&into.state).await.unwrap();
    grandchild.machine.resume().await.unwrap();
    assert_eq!(grandchild.machine.condition().await.unwrap(), Condition::Runs);
    for vm in [first, second, third] {
        vm.end().await;
    }
}

#[tokio::test]
async fn calls_in_the_wrong_state_are_refused_and_harm_nothing() {
    let bed = Bed::new().await;
    let (running, waiting) = (bed.vm("vm-1"), bed.vm("vm-2"));
    let vm = running.boot().await;
    let place = running.place("place");
    // While it runs it is not saved.
    refused(place.save(vm.machine.as_ref(), Extent::Changed).await);
    refused(place.save(vm.machine.as_ref(), Extent::All).await);
    // What runs takes nothing on.
    vm.machine.pause().await.unwrap();
    place.save(vm.machine.as_ref(), Extent::All).await.unwrap();
    refused(vm.machine.load(&place.state).await);
    vm.machine.resume().await.unwrap();
    // Without a place for its memory it cannot be.
    refused(vm.machine.save(&place.state, None).await);
    refused(vm.machine.memory_address().await);
    assert_eq!(vm.machine.condition().await.unwrap(), Condition::Runs);

    let from = waiting.copy_of(&place, "from");
    let empty = waiting.wait_for(&from).await;
    // What has no guest yet can do nothing but take one on.
    refused(empty.machine.pause().await);
    refused(empty.machine.resume().await);
    refused(from.save(empty.machine.as_ref(), Extent::All).await);
    assert!(matches!(empty.machine.condition().await.unwrap(), Condition::Stopped(_)));
    empty.machine.load(&from.state).await.unwrap();
    running.end().await;
    waiting.end().await;
}

#[tokio::test]
async fn a_disk_grows_while_its_vm_runs() {
    let bed = Bed::new().await;
    let home = bed.vm("vm-1");
    let vm = home.boot().await;
    vm.machine.grow_layer(128 << 20).await.unwrap();
    assert_eq!(fs::metadata(home.home.layer()).unwrap().len(), 128 << 20);
    vm.machine.pause().await.unwrap();
    vm.machine.grow_layer(256 << 20).await.unwrap();
    vm.machine.resume().await.unwrap();
    home.end().await;
}

#[tokio::test]
async fn an_agent_that_comes_back_takes_over_what_runs() {
    let bed = Bed::new().await;
    let home = bed.vm("vm-1");
    let vm = home.boot().await;
    drop(vm.machine);
    let machine = bed.vmm.attach(&home.home).await.unwrap();
    machine.pause().await.unwrap();
    let place = home.place("place");
    place.save(machine.as_ref(), Extent::Changed).await.unwrap();
    machine.resume().await.unwrap();
    // Nobody listens in a guest that is not up, which is told and not waited for.
    let dialled = timeout(Duration::from_secs(10), bed.vmm.dial(&home.home)).await.unwrap();
    assert!(dialled.is_err());
    vm.process.kill().await.unwrap();
    assert!(bed.vmm.attach(&home.home).await.is_err());
    assert!(machine.pause().await.is_err());
    home.end().await;
}

#[tokio::test]
async fn ten_are_started_saved_and_restored_at_once() {
    let bed = Bed::new().await;
    let origin = bed.vm("vm-origin");
    let (vm, golden) = origin.boot_and_save("golden", Extent::Changed).await;
    origin.end_but_keep(&vm).await;
    let clones: Vec<_> = (0..10).map(|number| bed.vm(&format!("vm-{number}"))).collect();
    join_all(clones.iter().map(|home| async {
        // One image for all of them.
        let clone = home.launch(Memory::CopyOf(golden.memory.clone()), Start::Paused).await.unwrap();
        clone.machine.load(&golden.state).await.unwrap();
        clone.machine.resume().await.unwrap();
        clone.machine.pause().await.unwrap();
        let place = home.place("place");
        place.save(clone.machine.as_ref(), Extent::Changed).await.unwrap();
        assert!(fs::metadata(&place.state).unwrap().len() > 0);
    }))
    .await;
    for home in clones {
        home.end().await;
    }
    origin.end().await;
}

#[tokio::test]
async fn a_vmm_opens_the_tap_of_its_own_namespace_and_finds_it_again() {
    let bed = Bed::with_network().await;
    let (first, second) = (bed.vm("vm-1"), bed.vm("vm-2"));
    let (vm, golden) = first.boot_and_save("golden", Extent::Changed).await;
    // By the same name in another namespace, while the first one still has its own.
    let from = second.copy_of(&golden, "from");
    let clone = second.wait_for(&from).await;
    clone.machine.load(&from.state).await.unwrap();
    clone.machine.resume().await.unwrap();
    vm.machine.resume().await.unwrap();
    assert_ne!(first.home.network().unwrap(), second.home.network().unwrap());
    let namespace = |home: &Vm<'_>| {
        let pid = home.cgroup.processes().unwrap()[0];
        fs::metadata(format!("/proc/{pid}/ns/net")).unwrap().ino()
    };
    assert_ne!(namespace(&first), namespace(&second));
    let pid = first.cgroup.processes().unwrap()[0];
    let links = fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap();
    assert!(links.contains("tap0:") && links.contains("up:"), "{links}");
    first.end().await;
    second.end().await;
    bed.end().await;
}
