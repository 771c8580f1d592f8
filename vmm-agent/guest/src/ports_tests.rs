use std::future::Future;

use futures_util::{StreamExt as _, stream};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use oc_port::MAX_READ;
use oc_proto::v1::{
    ForwardPortResponse, port_service_client::PortServiceClient, port_service_server::PortServiceServer,
};
use prost::Message as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpSocket},
    sync::mpsc,
    task::JoinHandle,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{body::Body, codegen::Service as _};

use super::*;

type Client = PortServiceClient<PortServiceServer<Ports>>;

/// Serves one connection with `serve`; the port.
async fn listen<F, T>(serve: impl FnOnce(TcpStream) -> F + Send + 'static) -> (u16, JoinHandle<T>)
where
    F: Future<Output = T> + Send,
    T: Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let served = tokio::spawn(async move { serve(listener.accept().await.unwrap().0).await });
    (port, served)
}

fn client(ports: &Ports) -> Client {
    PortServiceClient::new(PortServiceServer::new(ports.clone()))
}

fn part(port: u16, data: &'static [u8]) -> ForwardPortRequest {
    ForwardPortRequest { port: port.into(), data: data.into(), ..Default::default() }
}

/// A call; what is sent to it goes to the port.
async fn open(
    client: &mut Client,
    port: u16,
) -> Result<(mpsc::Sender<ForwardPortRequest>, Streaming<ForwardPortResponse>), Status> {
    let (sender, parts) = mpsc::channel(1);
    sender.send(part(port, b"")).await.unwrap();
    let mut answer = client.forward_port(ReceiverStream::new(parts)).await?.into_inner();
    assert!(answer.message().await.unwrap().unwrap().data.is_empty());
    Ok((sender, answer))
}

fn reason(status: &Status) -> String {
    use tonic_types::StatusExt as _;
    status.get_error_details().error_info().unwrap().reason.clone()
}

#[tokio::test]
async fn bytes_go_both_ways_and_each_side_ends_its_own() {
    let (port, served) = listen(|mut socket| async move {
        let mut got = Vec::new();
        socket.read_to_end(&mut got).await.unwrap();
        // The client has ended its side; this one goes on.
        socket.write_all(&got).await.unwrap();
        got
    })
    .await;
    let (sender, answer) = open(&mut client(&Ports::default()), port).await.unwrap();
    sender.send(part(0, b"to and ")).await.unwrap();
    sender.send(part(0, b"fro")).await.unwrap();
    drop(sender);
    let answer: Vec<_> = answer.map(|part| part.unwrap().data).collect().await;
    assert_eq!(answer.concat(), b"to and fro");
    assert!(answer.last().unwrap().is_empty());
    assert_eq!(served.await.unwrap(), b"to and fro");
}

#[tokio::test]
async fn a_port_that_ends_first_is_told_of_and_still_hears_the_client() {
    let (port, served) = listen(|mut socket| async move {
        socket.shutdown().await.unwrap();
        let mut got = Vec::new();
        socket.read_to_end(&mut got).await.map(|_| got)
    })
    .await;
    let (sender, mut answer) = open(&mut client(&Ports::default()), port).await.unwrap();
    assert!(answer.message().await.unwrap().unwrap().data.is_empty());
    sender.send(part(0, b"late")).await.unwrap();
    drop(sender);
    assert_eq!(answer.message().await.unwrap(), None);
    assert_eq!(served.await.unwrap().unwrap(), b"late");
}

#[tokio::test]
async fn much_comes_whole_in_messages_of_a_bounded_size() {
    const ALL: usize = 8 << 20;
    let (port, _served) = listen(|mut socket| async move {
        for number in 0..ALL / 4 {
            socket.write_all(&u32::try_from(number).unwrap().to_le_bytes()).await.unwrap();
        }
    })
    .await;
    let (sender, mut answer) = open(&mut client(&Ports::default()), port).await.unwrap();
    drop(sender);
    let mut got = Vec::new();
    while let Some(part) = answer.message().await.unwrap() {
        assert!(part.data.len() <= MAX_READ);
        got.extend_from_slice(&part.data);
    }
    assert_eq!(got.len(), ALL);
    assert!(got.chunks(4).zip(0_u32..).all(|(chunk, number)| chunk == number.to_le_bytes()));
}

#[tokio::test]
async fn a_client_that_does_not_read_can_still_write() {
    let (port, served) = listen(|socket| async move {
        let (mut reader, mut writer) = socket.into_split();
        let flood = tokio::spawn(async move { while writer.write_all(&[b'x'; 4096]).await.is_ok() {} });
        let mut got = vec![0; 1 << 20];
        reader.read_exact(&mut got).await.unwrap();
        flood.abort();
    })
    .await;
    let (sender, _answer) = open(&mut client(&Ports::default()), port).await.unwrap();
    for _ in 0..256 {
        sender.send(part(0, &[b'y'; 4096])).await.unwrap();
    }
    timeout(Duration::from_secs(10), served).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_client_that_goes_away_resets_the_connection_and_frees_its_place() {
    let (port, served) = listen(|mut socket| async move { socket.read(&mut [0; 1]).await }).await;
    let ports = Ports::default();
    let (sender, answer) = open(&mut client(&ports), port).await.unwrap();
    assert_eq!(ports.room.available_permits(), MAX_CONNECTIONS - 1);
    drop(answer);
    let ended = served.await.unwrap();
    assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    sender.closed().await;
    assert_eq!(ports.room.available_permits(), MAX_CONNECTIONS);
}

#[tokio::test]
async fn a_stream_that_breaks_is_not_taken_for_one_that_has_ended() {
    let (port, served) = listen(|mut socket| async move { socket.read(&mut [0; 1]).await }).await;
    let head = part(port, b"");
    let length = u32::try_from(head.encoded_len()).unwrap().to_be_bytes();
    let message = [&[0], &length[..], &head.encode_to_vec()].concat();
    let frames = [Ok(Frame::data(message.into())), Err(Status::cancelled("gone"))];
    let request = tonic::codegen::http::Request::post("/oc.v1.PortService/ForwardPort")
        .body(Body::new(StreamBody::new(stream::iter(frames))))
        .unwrap();
    let mut service = PortServiceServer::new(Ports::default());
    let response = service.call(crate::cancel::broken_off_is_an_error(request)).await.unwrap();
    let end = response.into_body().collect().await.unwrap();
    let status = Status::from_header_map(end.trailers().unwrap()).unwrap();
    assert_eq!(status.code(), tonic::Code::Aborted);
    assert_eq!(served.await.unwrap().unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn what_the_port_said_before_it_broke_comes_first() {
    let (port, served) = listen(|mut socket| async move {
        socket.write_all(b"last words").await.unwrap();
        // Answered before anything is reset.
        socket.read_exact(&mut [0; 3]).await.unwrap();
        socket.set_zero_linger().unwrap();
    })
    .await;
    let (sender, mut answer) = open(&mut client(&Ports::default()), port).await.unwrap();
    assert_eq!(answer.message().await.unwrap().unwrap().data, "last words");
    sender.send(part(0, b"bye")).await.unwrap();
    served.await.unwrap();
    let error = loop {
        match answer.message().await {
            Ok(part) => assert!(part.is_some(), "it ended as if it were whole"),
            Err(error) => break error,
        }
    };
    assert_eq!((reason(&error).as_str(), error.code()), ("PORT_RESET", tonic::Code::Aborted));
}

#[tokio::test]
async fn it_listens_on_either_address() {
    let Ok(listener) = TcpListener::bind("[::1]:0").await else {
        eprintln!("this machine has no ::1: not tried");
        return;
    };
    let port = listener.local_addr().unwrap().port();
    open(&mut client(&Ports::default()), port).await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_connected_says_why() {
    // Bound by a socket that does not listen, so that it becomes nobody else's.
    let bound = TcpSocket::new_v4().unwrap();
    bound.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let nobody = bound.local_addr().unwrap().port();
    let ports = Ports::default();
    let mut client = client(&ports);
    let refused = open(&mut client, nobody).await.unwrap_err();
    assert_eq!(reason(&refused), "PORT_NOT_LISTENING");
    assert_eq!(reason(&open(&mut client, 0).await.unwrap_err()), "INVALID_ARGUMENT");
    let large = ForwardPortRequest { port: 65_536, ..Default::default() };
    let refused = client.forward_port(stream::iter([large])).await.unwrap_err();
    assert_eq!(reason(&refused), "INVALID_ARGUMENT");
    let refused = client.forward_port(stream::iter([])).await.unwrap_err();
    assert_eq!(reason(&refused), "INVALID_ARGUMENT");
    let _all = ports.room.try_acquire_many(u32::try_from(MAX_CONNECTIONS).unwrap()).unwrap();
    assert_eq!(reason(&open(&mut client, nobody).await.unwrap_err()), "OVERLOADED");
}
