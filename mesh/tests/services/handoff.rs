//! Connections that go from one process to another.

use std::{
    fs, io,
    os::{fd::OwnedFd, unix::fs::PermissionsExt as _},
};

use oc_mesh::{
    endpoint::Endpoint,
    handoff::{Handoffs, KEY_BYTES, Wanted, socket_of},
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

/// Both sides of a TCP connection: the one to hand over, and its peer.
async fn connection() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (peer, _) = listener.accept().await.unwrap();
    (ours.into_std().unwrap().into(), peer)
}

fn stream(descriptor: OwnedFd) -> TcpStream {
    TcpStream::from_std(descriptor.into()).unwrap()
}

async fn open() -> (TempDir, Handoffs, std::path::PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = socket_of(&Endpoint::Unix(directory.path().join("a.sock"))).unwrap();
    let handoffs = Handoffs::open(&path).await.unwrap();
    (directory, handoffs, path)
}

#[tokio::test]
async fn who_knows_the_key_gets_the_connection_and_keeps_it() {
    let (directory, handoffs, path) = open().await;
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let (ours, mut peer) = connection().await;
    let wanted = Wanted::at(&path).unwrap().unwrap();
    let offer = handoffs.offer(wanted.key(), ours).unwrap();
    let mut fetched = stream(wanted.fetch().await.unwrap());
    peer.write_all(b"to us").await.unwrap();
    let mut told = [0; 5];
    fetched.read_exact(&mut told).await.unwrap();
    assert_eq!(&told, b"to us");
    // From here on it is the only one's who has it.
    offer.over();
    fetched.write_all(b"to the peer").await.unwrap();
    drop(fetched);
    let mut told = String::new();
    peer.read_to_string(&mut told).await.unwrap();
    assert_eq!(told, "to the peer");
    drop(handoffs);
    crate::until("its socket goes", async || fs::read_dir(directory.path()).unwrap().count() == 0).await;
}

#[tokio::test]
async fn what_is_taken_back_is_reset_for_all() {
    let (_directory, handoffs, path) = open().await;
    let (ours, mut peer) = connection().await;
    let wanted = Wanted::at(&path).unwrap().unwrap();
    let offer = handoffs.offer(wanted.key(), ours).unwrap();
    let mut fetched = stream(wanted.fetch().await.unwrap());
    peer.write_all(b"unread").await.unwrap();
    fetched.readable().await.unwrap();
    let taken_back = tokio::spawn(async move { drop(offer) });
    // Neither takes what it got for all there was.
    let kind = async |side: &mut TcpStream| side.read_to_end(&mut Vec::new()).await.unwrap_err().kind();
    taken_back.await.unwrap();
    assert_eq!(kind(&mut fetched).await, io::ErrorKind::ConnectionReset);
    assert_eq!(kind(&mut peer).await, io::ErrorKind::ConnectionReset);
    assert_eq!(fetched.write(b"more").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
}

#[tokio::test]
async fn nobody_gets_anything_by_another_key() {
    let (_directory, handoffs, path) = open().await;
    let gone = async |wanted: Wanted<'_>| wanted.fetch().await.unwrap_err().kind();
    assert_eq!(gone(Wanted::at(&path).unwrap().unwrap()).await, io::ErrorKind::NotFound);
    let (ours, _peer) = connection().await;
    let offer = handoffs.offer(&[7; KEY_BYTES], ours).unwrap();
    for bad in [&[7; KEY_BYTES][..], &[8; KEY_BYTES - 1], &[8; KEY_BYTES + 1], &[]] {
        let (another, _peer) = connection().await;
        assert!(handoffs.offer(bad, another).is_none(), "{bad:?}");
    }
    assert_eq!(gone(Wanted::at(&path).unwrap().unwrap()).await, io::ErrorKind::NotFound);
    // One that is taken back before it was fetched.
    let wanted = Wanted::at(&path).unwrap().unwrap();
    let (ours, _peer) = connection().await;
    drop(handoffs.offer(wanted.key(), ours).unwrap());
    assert_eq!(gone(wanted).await, io::ErrorKind::NotFound);
    drop(offer);
    assert!(Wanted::at(&path.with_extension("none")).unwrap().is_none());
}
