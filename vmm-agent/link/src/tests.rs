//! Both ends against each other, and against what a port may do to them.

use std::time::Duration;

use proptest::prelude::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

use crate::{GuestPort, HostLink, MAX_PAYLOAD, Nonce, codec};

const WITHIN: Duration = Duration::from_secs(10);

fn nonce(seed: u8) -> Nonce {
    Nonce(std::array::from_fn(|at| seed.wrapping_mul(31).wrapping_add(u8::try_from(at).unwrap())))
}

/// A guest that echoes every session until its end, on a port that outlives all hosts.
fn echo(port: DuplexStream) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        let mut port = GuestPort::new(port);
        loop {
            let Ok(mut session) = port.accept().await else { return };
            tokio::spawn(async move {
                let mut buffer = vec![0; 8192];
                while let Ok(count @ 1..) = session.read(&mut buffer).await {
                    if session.write_all(&buffer[..count]).await.is_err() || session.flush().await.is_err() {
                        return;
                    }
                }
            });
        }
    })
}

async fn ask(link: &mut HostLink<&mut DuplexStream>, question: &[u8]) -> Vec<u8> {
    let mut answer = vec![0; question.len()];
    let (mut reader, mut writer) = tokio::io::split(link);
    let write = async {
        writer.write_all(question).await.unwrap();
        writer.flush().await.unwrap();
    };
    let ((), read) = tokio::join!(write, reader.read_exact(&mut answer));
    read.unwrap();
    answer
}

/// Time stands still until all wait, then jumps to the next deadline: a test that is stuck fails at once.
fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(3600), test).await.unwrap() })
}

#[test]
fn bytes_come_back_whole_through_frames_of_every_size() {
    run(async {
        let (mut host, guest) = duplex(10_000);
        echo(guest);
        let mut link = HostLink::connect(&mut host, nonce(1), WITHIN).await.unwrap();
        for size in [1, 7, MAX_PAYLOAD - 1, MAX_PAYLOAD, MAX_PAYLOAD + 1, 5 * MAX_PAYLOAD] {
            let question: Vec<u8> = (0..size).map(|at| (at % 251) as u8).collect();
            assert_eq!(ask(&mut link, &question).await, question, "{size}");
        }
    });
}

#[test]
fn a_new_host_gets_nothing_of_the_session_before() {
    run(async {
        let (mut host, guest) = duplex(1 << 20);
        echo(guest);
        let mut first = HostLink::connect(&mut host, nonce(1), WITHIN).await.unwrap();
        // Asked, and gone before the answer.
        first.write_all(&[1; 100_000]).await.unwrap();
        first.flush().await.unwrap();
        drop(first);
        let mut second = HostLink::connect(&mut host, nonce(2), WITHIN).await.unwrap();
        assert_eq!(ask(&mut second, &[2; 1000]).await, [2; 1000]);
    });
}

#[test]
fn a_host_that_died_in_a_frame_does_not_keep_the_next_one_out() {
    run(async {
        let (mut host, guest) = duplex(1 << 20);
        echo(guest);
        drop(HostLink::connect(&mut host, nonce(1), WITHIN).await.unwrap());
        host.write_all(&codec::header(nonce(1).session(), MAX_PAYLOAD)).await.unwrap();
        host.write_all(&[7; 100]).await.unwrap();
        let mut link = HostLink::connect(&mut host, nonce(2), WITHIN).await.unwrap();
        assert_eq!(ask(&mut link, b"hello").await, b"hello");
    });
}

#[test]
fn a_payload_that_looks_like_a_hello_is_a_payload() {
    run(async {
        let (mut host, guest) = duplex(1 << 20);
        echo(guest);
        let mut link = HostLink::connect(&mut host, nonce(1), WITHIN).await.unwrap();
        let forged = nonce(9).hello();
        assert_eq!(ask(&mut link, &forged).await, forged);
        assert_eq!(ask(&mut link, b"still here").await, b"still here");
    });
}

#[test]
fn a_silent_guest_is_given_up() {
    run(async {
        let (mut host, _guest) = duplex(64);
        let result = HostLink::connect(&mut host, nonce(1), WITHIN).await;
        assert!(matches!(result, Err(crate::HandshakeError::Silent)));
    });
}

#[test]
fn a_guest_that_sends_no_frames_is_given_up() {
    run(async {
        let (mut host, mut guest) = duplex(1 << 16);
        guest.write_all(&nonce(1).answer()).await.unwrap();
        guest.write_all(&[0xff; 1000]).await.unwrap();
        let mut link = HostLink::connect(&mut host, nonce(1), WITHIN).await.unwrap();
        let error = link.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidData);
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever hosts before left on the wire, in whatever pieces, a new session works and sees only itself.
    #[test]
    fn sessions_never_mix(
        leftovers in prop::collection::vec(
            prop_oneof![
                prop::collection::vec(any::<u8>(), 0..600),
                (any::<u16>(), 0..MAX_PAYLOAD).prop_map(|(session, length)| codec::header(session, length).to_vec()),
                any::<u8>().prop_map(|seed| nonce(seed).hello().to_vec()),
            ],
            0..6,
        ),
        pipe in 1usize..5000,
        question in prop::collection::vec(any::<u8>(), 1..20_000),
    ) {
        run(async {
            let (mut host, guest) = duplex(pipe);
            echo(guest);
            for leftover in leftovers {
                // The guest may be in a session that answers: somebody must read.
                let mut sink = vec![0; 4096];
                let (mut reader, mut writer) = tokio::io::split(&mut host);
                let drain = async { while reader.read(&mut sink).await.is_ok_and(|count| count > 0) {} };
                tokio::select! {
                    written = writer.write_all(&leftover) => written.unwrap(),
                    () = drain => unreachable!("the guest never hangs up"),
                }
            }
            let mut link = HostLink::connect(&mut host, Nonce([0xa7; 16]), Duration::from_secs(60)).await.unwrap();
            prop_assert_eq!(ask(&mut link, &question).await, question);
            Ok(())
        })?;
    }
}
