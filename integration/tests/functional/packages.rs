//! Packages as sandboxes get them: with the real clients, from registries that stand in a world.

use std::{fs, process::Command};

use anyhow::ensure;
use oc_integration::{mesh::succeeded, rest::Sandbox, world::World};
use serde_json::json;
use sha2::{Digest as _, Sha256};

const WHEEL: &str = "greeting-1.0-py3-none-any.whl";
const DEB: &str = "greeting_1.0_all.deb";
/// What is in either.
const GREETING: &str = "hello from the world\n";
/// As little as a Debian package may say of itself.
const CONTROL: &str = "Package: greeting\nVersion: 1.0\nArchitecture: all\nMaintainer: nobody <nobody@world.test>\n\
                       Description: greets\n";

/// The sandbox finds `world.test` and gets what is published there.
pub async fn arrive(world: &World, sandbox: &Sandbox) -> anyhow::Result<()> {
    by_pip(world, sandbox).await?;
    by_apt(world, sandbox).await
}

async fn by_pip(world: &World, sandbox: &Sandbox) -> anyhow::Result<()> {
    let wheel = wheel()?;
    let page = format!("<!DOCTYPE html><a href=\"/files/{WHEEL}#sha256={}\">{WHEEL}</a>", digest(&wheel));
    world.publish("/simple/greeting/", page);
    world.publish(&format!("/files/{WHEEL}"), wheel.clone());
    let script = "pip download --no-deps --no-cache-dir --disable-pip-version-check \
                  --index-url http://world.test/simple --trusted-host world.test --dest got greeting";
    run(sandbox, "sandbox", script).await?;
    let got = sandbox.read(&format!("got/{WHEEL}")).await?.expect(200)?.body;
    assert_eq!(got, wheel, "the wheel is whole");
    Ok(())
}

/// A wheel with one module.
fn wheel() -> anyhow::Result<Vec<u8>> {
    let directory = tempfile::tempdir()?;
    let about = directory.path().join("greeting-1.0.dist-info");
    fs::create_dir(&about)?;
    fs::write(about.join("METADATA"), "Metadata-Version: 2.1\nName: greeting\nVersion: 1.0\n")?;
    fs::write(
        about.join("WHEEL"),
        "Wheel-Version: 1.0\nGenerator: nobody\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    )?;
    fs::write(about.join("RECORD"), "")?;
    fs::write(directory.path().join("greeting.py"), format!("'''{GREETING}'''\n"))?;
    let mut zip = Command::new("python3");
    zip.current_dir(&directory);
    zip.args(["-m", "zipfile", "-c", WHEEL, "greeting.py", "greeting-1.0.dist-info"]);
    succeeded(zip)?;
    Ok(fs::read(directory.path().join(WHEEL))?)
}

async fn by_apt(world: &World, sandbox: &Sandbox) -> anyhow::Result<()> {
    let deb = deb()?;
    let packages = format!("{CONTROL}Filename: {DEB}\nSize: {}\nSHA256: {}\n", deb.len(), digest(&deb));
    let release = format!(
        "Date: Sat, 01 Jan 2000 00:00:00 UTC\nSHA256:\n {} {} Packages\n",
        digest(packages.as_bytes()),
        packages.len()
    );
    world.publish("/apt/Release", release);
    world.publish("/apt/Packages", packages);
    world.publish(&format!("/apt/{DEB}"), deb);
    // No other source is asked.
    let script = "set -e; echo 'deb [trusted=yes] http://world.test/apt /' > /root/world.list
        apt() { DEBIAN_FRONTEND=noninteractive apt-get -q -o Dir::Etc::sourcelist=/root/world.list \\
            -o Dir::Etc::sourceparts=- \"$@\" >&2; }
        apt update; apt install -y greeting
        cat /usr/share/greeting/text";
    assert_eq!(run(sandbox, "root", script).await?, GREETING);
    Ok(())
}

/// A package with one file.
fn deb() -> anyhow::Result<Vec<u8>> {
    let directory = tempfile::tempdir()?;
    let (root, deb) = (directory.path().join("root"), directory.path().join(DEB));
    fs::create_dir_all(root.join("DEBIAN"))?;
    fs::create_dir_all(root.join("usr/share/greeting"))?;
    fs::write(root.join("DEBIAN/control"), CONTROL)?;
    fs::write(root.join("usr/share/greeting/text"), GREETING)?;
    let mut build = Command::new("dpkg-deb");
    build.args(["--root-owner-group", "--build"]).args([&root, &deb]);
    succeeded(build)?;
    Ok(fs::read(deb)?)
}

fn digest(content: &[u8]) -> String {
    hex::encode(&Sha256::digest(content)[..])
}

/// Runs what takes long in an emulated guest.
async fn run(sandbox: &Sandbox, user: &str, script: &str) -> anyhow::Result<String> {
    let ran = sandbox.run_with(json!({ "cmd": script, "user": user, "timeout": 300 })).await?;
    ensure!(ran.code == 0, "{script}: {}: {}{}", ran.code, ran.stdout, ran.stderr);
    Ok(ran.stdout)
}
