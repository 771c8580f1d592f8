//! Ports that behave in every way a port can.

use std::sync::{Arc, Mutex};

use oc_proto::v1::{port_service_server::PortService, *};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

use super::{State, refused};

pub struct Ports(pub Arc<Mutex<State>>);

type Answers = mpsc::Sender<Result<ForwardPortResponse, Status>>;

async fn say(answers: &Answers, data: &[u8]) {
    let _ = answers.send(Ok(ForwardPortResponse { data: data.to_vec().into(), ..Default::default() })).await;
}

#[tonic::async_trait]
impl PortService for Ports {
    type ForwardPortStream = ReceiverStream<Result<ForwardPortResponse, Status>>;

    async fn forward_port(
        &self,
        request: Request<Streaming<ForwardPortRequest>>,
    ) -> Result<Response<Self::ForwardPortStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?.unwrap();
        if first.port == 9 {
            return Err(refused(Code::FailedPrecondition, "PORT_NOT_LISTENING", "nobody listens on port 9"));
        }
        let (answers, stream) = mpsc::channel(4);
        let state = Arc::clone(&self.0);
        tokio::spawn(async move {
            say(&answers, b"").await;
            let mut heard = Vec::new();
            if first.port == 11 {
                // Speaks first, and is done before it listens.
                say(&answers, b"hello").await;
                say(&answers, b"").await;
            }
            loop {
                match requests.message().await {
                    Ok(Some(request)) => {
                        heard.extend(&request.data);
                        if first.port == 7 {
                            say(&answers, &request.data).await;
                        }
                        if first.port == 13 {
                            say(&answers, b"half").await;
                            let reset = refused(Code::Aborted, "PORT_RESET", "the connection broke");
                            let _ = answers.send(Err(reset)).await;
                            return;
                        }
                    }
                    Ok(None) => break,
                    Err(_) => {
                        heard = b"(broke)".to_vec();
                        break;
                    }
                }
            }
            state.lock().unwrap().forwarded.push((first.port, heard));
            if first.port == 7 {
                say(&answers, b"bye").await;
                say(&answers, b"").await;
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}
