//! The VMM ends, or whoever drives it goes away, at each step: the next one says so, and all of it can be removed.

use std::{io, path::Path};

use anyhow::ensure;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use oc_integration::{
    firecracker::{Bed, Launched, Saved, Vm, settings},
    leftovers,
    mesh::{Mesh, eventually},
};
use oc_vmm_agent::driver::{
    cgroup::Cgroups,
    firecracker::Firecracker,
    vmm::{Extent, Vmm as _, VmmError},
};
use serde_json::json;
use tokio::time::{Duration, timeout};

/// What is done with a VM, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Pause,
    Save,
    Resume,
}

const STEPS: [Step; 3] = [Step::Pause, Step::Save, Step::Resume];

async fn take(step: Step, vm: &Launched, place: &Saved) -> Result<(), VmmError> {
    match step {
        Step::Pause => vm.machine.pause().await,
        Step::Save => place.save(vm.machine.as_ref(), Extent::All).await,
        Step::Resume => vm.machine.resume().await,
    }
}

#[tokio::test]
async fn a_vmm_that_is_killed_before_a_step_is_missed_at_it() {
    let bed = Bed::new().await;
    for (number, killed_before) in STEPS.into_iter().enumerate() {
        let home = bed.vm(&format!("vm-{number}"));
        let (vm, place) = (home.boot().await, home.place("place"));
        for step in STEPS {
            if step == killed_before {
                vm.process.kill().await.unwrap();
                let missed = take(step, &vm, &place).await;
                assert!(matches!(missed, Err(VmmError::Lost(_))), "{step:?}: {missed:?}");
                break;
            }
            take(step, &vm, &place).await.unwrap();
        }
        home.end().await;
    }
}

#[tokio::test]
async fn a_vmm_that_is_killed_amid_a_step_is_missed_at_it() {
    let bed = Bed::new().await;
    for (number, after) in [0, 2, 10, 40].into_iter().enumerate() {
        let home = bed.vm(&format!("vm-{number}"));
        let (vm, place) = (home.boot().await, home.place("place"));
        vm.machine.pause().await.unwrap();
        let kill = async {
            tokio::time::sleep(Duration::from_millis(after)).await;
            vm.process.kill().await.unwrap();
        };
        let saving = place.save(vm.machine.as_ref(), Extent::All);
        let (saved, ()) = tokio::join!(timeout(Duration::from_secs(20), saving), kill);
        // It may have been done before.
        if let Err(error) = saved.expect("it does not wait for ever") {
            assert!(matches!(error, VmmError::Lost(_)), "{error:?}");
        }
        home.end().await;
    }
}

/// As when the agent is killed: nobody is told, nothing is undone.
async fn forgotten(bed: &Bed, home: &Vm<'_>, amid: Duration) {
    // On a task that is given up, wherever it is.
    let launching = timeout(amid, home.boot()).await;
    if let Ok(vm) = launching {
        std::mem::forget(vm.console);
        bed.vmm.attach(&home.home).await.unwrap();
    }
}

#[tokio::test]
async fn what_a_killed_agent_was_about_to_launch_can_be_removed() {
    let bed = Bed::new().await;
    for (number, amid) in [0, 1, 3, 8, 15, 30, 60, 500].into_iter().enumerate() {
        let home = bed.vm(&format!("vm-{number}"));
        forgotten(&bed, &home, Duration::from_millis(amid)).await;
        home.end().await;
    }
}

#[tokio::test]
async fn a_driver_of_a_later_agent_goes_on_amid_anything() {
    let bed = Bed::new().await;
    let home = bed.vm("vm-1");
    let (vm, place) = (home.boot().await, home.place("place"));
    vm.machine.pause().await.unwrap();
    // The call is given up, the VMM goes on with it.
    let saving = place.save(vm.machine.as_ref(), Extent::All);
    let _ = timeout(Duration::from_millis(1), saving).await;
    drop(vm.machine);
    let later = Firecracker::find(settings(), false).await.unwrap();
    let machine = later.attach(&home.home).await.unwrap();
    place.save(machine.as_ref(), Extent::All).await.unwrap();
    machine.resume().await.unwrap();
    home.end().await;
}

/// The processes of a mesh's VMs.
fn vmms(mesh: &Mesh) -> anyhow::Result<Vec<i32>> {
    let groups = Cgroups::find(&format!("{}-{}", mesh.host_id(), leftovers::tag(mesh.state())))?;
    let processes = groups.existing()?.into_iter().map(|vm| groups.of(&vm).processes());
    Ok(processes.collect::<io::Result<Vec<_>>>()?.concat())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_agent_that_is_killed_leaves_nothing_that_the_next_does_not_end() {
    let settings = settings();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let (firecracker, jailer) = (text(&settings.firecracker), text(&settings.jailer));
    let environment = [("OC_VMM", "firecracker"), ("OC_FIRECRACKER", &firecracker), ("OC_JAILER", &jailer)];
    let mesh = Mesh::start_in(None, &["--pool-size", "0"], &environment).unwrap();
    for amid in [0, 200, 1000] {
        let rest = mesh.rest();
        // Where no guest boots it is on its way for a minute.
        let creating = tokio::spawn(async move { rest.create(json!({})).await });
        let started = eventually("a VMM", async || {
            let vmms = vmms(&mesh)?;
            ensure!(!vmms.is_empty(), "there is none");
            Ok(vmms)
        });
        let started = started.await.unwrap();
        tokio::time::sleep(Duration::from_millis(amid)).await;
        let agent = mesh.running_pid("vmm-agent").await.unwrap();
        let is_answered = creating.is_finished();
        kill(Pid::from_raw(agent), Signal::SIGKILL).unwrap();
        let next = eventually("the next agent", async || {
            let next = mesh.pid("vmm-agent")?;
            ensure!(next != agent, "it is the one before");
            Ok(())
        });
        next.await.unwrap();
        // One that runs is taken over, which is seen where guests boot.
        if !is_answered {
            let ended = eventually("what was being started is ended", async || {
                let left = vmms(&mesh)?.into_iter().filter(|pid| started.contains(pid)).count();
                ensure!(left == 0, "{left} are left");
                Ok(())
            });
            ended.await.unwrap();
        }
        creating.abort();
    }
    // Nor is anything else left of them: directories, groups, namespaces, mounts.
    mesh.stop().unwrap();
}
