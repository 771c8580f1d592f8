//! Files by HTTP, as registries of packages have them: as much of HTTP/1.1 (RFC 9112) as their clients need.

use std::{
    collections::BTreeMap,
    io::{self, BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use super::PATIENCE;

/// What there is, by path.
#[derive(Clone, Debug, Default)]
pub(super) struct Files(Arc<Mutex<BTreeMap<String, Vec<u8>>>>);

impl Files {
    /// Has one more, or another one in its place.
    pub(super) fn put(&self, path: &str, content: Vec<u8>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(path.to_owned(), content);
    }

    /// Answers whoever connects; ends with the test's process.
    pub(super) fn serve(&self, listener: TcpListener) {
        let files = self.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { continue };
                let files = files.clone();
                thread::spawn(move || files.answer(&stream));
            }
        });
    }

    /// One request after the other, until the client has no more.
    fn answer(&self, mut stream: &TcpStream) -> io::Result<()> {
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut lines = BufReader::new(stream).lines();
        while let Some(request) = lines.next().transpose()? {
            while lines.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
            let path = request.split(' ').nth(1).unwrap_or_default();
            let found = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(path).cloned();
            let status = if found.is_some() { "200 OK" } else { "404 Not Found" };
            let kind = if path.ends_with('/') { "text/html" } else { "application/octet-stream" };
            let content = found.unwrap_or_default();
            let length = content.len();
            let head =
                format!("HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n");
            stream.write_all(&[head.as_bytes(), &content].concat())?;
        }
        Ok(())
    }
}
