//! Names for sandboxes: a resolver that tests have their host ask, and what one who asks too much takes from others.

use std::{
    net::{Ipv4Addr, UdpSocket},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Instant,
};

use anyhow::{Context as _, ensure};
use oc_integration::{mesh::eventually, rest::Sandbox};

/// Questions of a VM that are passed on each second, and at first as many at once (vmm-agent/src/network/rules.rs).
const PER_SECOND: usize = 200;
/// Those of it that wait for an answer, and for how many seconds (vmm-agent/src/network/dns.rs).
const WAITING: usize = 32;
const ANSWERS_WITHIN: u64 = 3;

/// What a name begins with that nobody answers for.
const SILENT: &str = "silent";

/// When a name was asked for, and how it begins.
type Asked = (Instant, String);

/// Answers every question with one address, until the test's process ends.
#[derive(Default)]
pub struct Resolver {
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Resolver {
    /// Answers questions with the address `with`, at an address of the loopback that nobody else has; that address.
    pub fn start(with: Ipv4Addr) -> anyhow::Result<(Self, Ipv4Addr)> {
        let mut all = (1..=254).map(|last| Ipv4Addr::new(127, 53, 7, last));
        let bound = all.find_map(|at| Some((UdpSocket::bind((at, 53)).ok()?, at)));
        let (socket, at) = bound.context("no address whose port 53 is free")?;
        let resolver = Self::default();
        let asked = resolver.asked.clone();
        thread::spawn(move || {
            let mut buffer = [0; 512];
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                let Some((label, answer)) = answer(&buffer[..length], with) else { continue };
                let is_silent = label == SILENT;
                // First: whoever has the answer finds it noted.
                asked.lock().unwrap_or_else(PoisonError::into_inner).push((Instant::now(), label));
                if !is_silent {
                    let _ = socket.send_to(&answer, from);
                }
            }
        });
        Ok((resolver, at))
    }

    /// When names were asked for that begin with `label`.
    fn asked(&self, label: &str) -> Vec<Instant> {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.iter().filter(|(_, one)| one == label).map(|(at, _)| *at).collect()
    }

    fn first(&self, label: &str) -> anyhow::Result<Instant> {
        self.asked(label).first().copied().with_context(|| format!("nobody asked for {label}"))
    }
}

/// The first label of the name that is asked for, and the answer (RFC 1035, 4.1).
fn answer(question: &[u8], with: Ipv4Addr) -> Option<(String, Vec<u8>)> {
    // The name ends with an empty label; type and class follow.
    let end = 12 + question.get(12..)?.iter().position(|byte| *byte == 0)? + 5;
    let label = question.get(13..)?.get(..usize::from(question[12]))?;
    let is_a = *question.get(end - 4..end)? == [0, 1, 0, 1];
    let mut answer = [&question[..2], &[0x81, 0x80, 0, 1, 0, u8::from(is_a), 0, 0, 0, 0]].concat();
    answer.extend_from_slice(&question[12..end]);
    if is_a {
        answer.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4]);
        answer.extend_from_slice(&with.octets());
    }
    Some((String::from_utf8_lossy(label).into_owned(), answer))
}

/// Run in the guest: asks for names without waiting for answers, 2,000 times between two that it waits for, or for ever.
const FLOOD: &str = r"
import socket, struct, sys, time
asker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
asker.settimeout(0.5)
def ask(label, number=0):
    name = bytes([len(label)]) + label + b'\4test\0'
    while True:
        try: return asker.sendto(struct.pack('!6H', number, 0x100, 1, 0, 0, 0) + name + struct.pack('!2H', 1, 1), ('198.18.0.53', 53))
        # It has sent more than can leave at the moment.
        except TimeoutError: pass
def learn(label):
    while True:
        ask(label)
        try:
            while label not in asker.recv(512): pass
            return
        except TimeoutError: pass
if sys.argv[1] == 'burst':
    learn(b'begin')
    for number in range(2000): ask(b'burst', number)
    learn(b'end')
while sys.argv[1] == 'silent':
    ask(b'silent')
    time.sleep(0.002)
";

/// A sandbox that asks for more names than it may gets no more through, and takes none from the other.
pub async fn are_shared(resolver: &Resolver, hostile: &Sandbox, other: &Sandbox) -> anyhow::Result<()> {
    hostile.put("flood.py", FLOOD).await?.expect(204)?;
    hostile.run("python3 flood.py burst").await?;
    let ended = resolver.first("end")?;
    // All of them passed between the two questions that the guest had answered.
    let took = usize::try_from(ended.duration_since(resolver.first("begin")?).as_millis())?;
    let (passed, most) = (resolver.asked("burst").len(), PER_SECOND + PER_SECOND * took / 1000 + 1);
    assert!(passed <= most, "{passed} of 2000 questions in {took} ms");

    let pid = hostile.run("python3 flood.py silent > flood.log 2>&1 & echo $!").await?;
    eventually("all places are taken", async || {
        let waiting = resolver.asked(SILENT).len();
        ensure!(waiting >= WAITING, "{waiting}");
        Ok(())
    })
    .await?;
    eventually("the other finds a name meanwhile", async || {
        let found = other.run("getent ahostsv4 other.test").await?;
        ensure!(found.contains("other.test"), "{found}");
        Ok(())
    })
    .await?;
    hostile.run(&format!("kill {pid}")).await.context("it asks no more")?;
    let silent = resolver.asked(SILENT);
    let took = silent.last().context("no last one")?.duration_since(ended).as_secs();
    // Each has its place for so long.
    let most = WAITING * usize::try_from(took / ANSWERS_WITHIN + 1)?;
    assert!(silent.len() <= most, "{} questions waited in {took} s", silent.len());
    Ok(())
}
