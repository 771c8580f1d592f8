//! TLS on the edge: which certificate a client is shown, and how new ones come into use.
//!
//! There is one pair of files for whoever asks for a name that no other has, and a directory with pairs for host names of
//! previews: `NAME.crt` and `NAME.key`, with `_.` for `*.`. All are read again once any of them has changed, and on SIGHUP. What
//! cannot be read, or does not fit together, is said and left out: the one that was in use before stays.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::Ipv6Addr,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use parking_lot::RwLock;
use rustls::{
    CertificateError::NotValidForNameContext,
    ServerConfig,
    client::verify_server_name,
    crypto::{CryptoProvider, aws_lc_rs},
    server::{ClientHello, ParsedCertificate, ResolvesServerCert},
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::interval,
};
use tokio_util::sync::CancellationToken;

/// How often files are looked at.
const LOOK: Duration = Duration::from_secs(2);
/// Pairs in the directory at most.
const MAX_PAIRS: usize = 10_000;
/// What is spoken within, best first.
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// Where certificates are.
#[derive(Debug, Clone)]
pub struct Files {
    /// The chain that is shown where no other fits.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Pairs for other names.
    pub directory: Option<PathBuf>,
}

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A pair that cannot be used.
    #[error("{path}: {problem}")]
    Pair {
        /// The certificate's file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The directory cannot be read.
    #[error("{path}: {source}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The library refuses.
    #[error(transparent)]
    Rustls(#[from] rustls::Error),
}

/// The certificates in use. Changes while connections are made.
#[derive(Debug)]
pub struct Certificates {
    files: Files,
    current: RwLock<Arc<Loaded>>,
}

#[derive(Debug)]
struct Loaded {
    default: Arc<CertifiedKey>,
    /// The host names that it names in full.
    default_names: Vec<String>,
    by_name: HashMap<String, Arc<CertifiedKey>>,
    /// As the files were when they were read.
    stamps: Stamps,
}

/// What changes when a file does.
type Stamps = BTreeMap<PathBuf, Option<(u64, u64, SystemTime)>>;

impl Certificates {
    /// Reads all of them.
    ///
    /// # Errors
    /// [`TlsError`] for the pair that is shown where no other fits.
    pub fn load(files: Files) -> Result<Arc<Self>, TlsError> {
        let loaded = Loaded::read(&files, None)?;
        Ok(Arc::new(Self { files, current: RwLock::new(Arc::new(loaded)) }))
    }

    /// How connections are accepted with them.
    ///
    /// # Errors
    /// The library refuses.
    pub fn server(self: &Arc<Self>) -> Result<Arc<ServerConfig>, TlsError> {
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(self) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).to_vec();
        config.ticketer = aws_lc_rs::Ticketer::new()?;
        Ok(Arc::new(config))
    }

    /// Reads them again as they change, until `stop`.
    pub async fn follow(self: Arc<Self>, stop: CancellationToken) {
        let mut hangups = signal(SignalKind::hangup()).ok();
        let mut look = interval(LOOK);
        loop {
            let asked = tokio::select! {
                () = stop.cancelled() => return,
                _ = look.tick() => false,
                Some(()) = async { hangups.as_mut()?.recv().await } => true,
            };
            let this = Arc::clone(&self);
            // Files may be on a slow disk.
            let _ = tokio::task::spawn_blocking(move || this.refresh(asked)).await;
        }
    }

    /// Reads them again if they have changed, or in any case.
    pub fn refresh(&self, in_any_case: bool) {
        let before = Arc::clone(&self.current.read());
        if !in_any_case && stamps(&self.files) == before.stamps {
            return;
        }
        match Loaded::read(&self.files, Some(&before)) {
            Ok(loaded) => {
                tracing::info!(names = loaded.by_name.len(), "certificates read");
                *self.current.write() = Arc::new(loaded);
            }
            Err(error) => tracing::error!(%error, "certificates stay as they were"),
        }
    }

    /// Whether the certificate that is shown where no other fits names this host, in lower case, in full.
    #[must_use]
    pub fn names_by_default(&self, host: &str) -> bool {
        self.current.read().default_names.iter().any(|name| name == host)
    }

    fn find(&self, name: Option<&str>) -> Arc<CertifiedKey> {
        let current = Arc::clone(&self.current.read());
        let by_name = |name: &str| {
            let wildcard = || current.by_name.get(&format!("*.{}", name.split_once('.')?.1));
            current.by_name.get(name).or_else(wildcard).cloned()
        };
        name.and_then(|name| by_name(&name.to_ascii_lowercase()))
            .unwrap_or_else(|| Arc::clone(&current.default))
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.find(hello.server_name()))
    }
}

impl Loaded {
    /// What cannot be read now is as it was before.
    fn read(files: &Files, before: Option<&Self>) -> Result<Self, TlsError> {
        // Before the files: what changes meanwhile is read again.
        let stamps = stamps(files);
        let default = match (pair(&files.certificate, &files.key), before) {
            (Ok(pair), _) => pair,
            (Err(error), Some(before)) => {
                tracing::error!(%error, "a certificate cannot be used, the one before stays");
                Arc::clone(&before.default)
            }
            (Err(error), None) => return Err(error),
        };
        let mut by_name = HashMap::new();
        for path in files.directory.as_deref().map(listed).transpose()?.unwrap_or_default() {
            let Some(name) = name_of(&path) else { continue };
            match pair(&path, &path.with_extension("key")) {
                Ok(pair) => {
                    by_name.insert(name, pair);
                }
                Err(error) => {
                    tracing::error!(%error, "a certificate cannot be used");
                    if let Some(pair) = before.and_then(|before| before.by_name.get(&name)) {
                        by_name.insert(name, Arc::clone(pair));
                    }
                }
            }
        }
        Ok(Self { default_names: names_in(&default), default, by_name, stamps })
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

/// A chain with the key that fits it.
fn pair(certificate: &Path, key: &Path) -> Result<Arc<CertifiedKey>, TlsError> {
    let wrong = |problem: String| TlsError::Pair { path: certificate.to_owned(), problem };
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| wrong(error.to_string()))?;
    let key = PrivateKeyDer::from_pem_file(key).map_err(|error| wrong(format!("its key: {error}")))?;
    let pair = CertifiedKey::from_der(chain, key, &provider()).map_err(|error| wrong(error.to_string()))?;
    Ok(Arc::new(pair))
}

/// The host names that a certificate names in full, in lower case.
fn names_in(pair: &CertifiedKey) -> Vec<String> {
    // The library tells them in one way alone: to say why another is none of them, as `DnsName("a.example")`.
    // Here that is an address for examples (RFC 3849), which no certificate has.
    let nobody = ServerName::from(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0));
    let refused = || verify_server_name(&ParsedCertificate::try_from(pair.end_entity_cert()?)?, &nobody);
    let presented = match refused() {
        Err(rustls::Error::InvalidCertificate(NotValidForNameContext { presented, .. })) => presented,
        _ => Vec::new(),
    };
    let hosts = presented.iter().filter_map(|name| name.strip_prefix("DnsName(\"")?.strip_suffix("\")"));
    hosts.filter(|name| !name.starts_with("*.")).map(str::to_ascii_lowercase).collect()
}

/// The certificates in a directory.
fn listed(directory: &Path) -> Result<Vec<PathBuf>, TlsError> {
    let failed = |source| TlsError::Directory { path: directory.to_owned(), source };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|extension| extension == "crt") && found.len() < MAX_PAIRS {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// The host name that a certificate's file is called after.
fn name_of(path: &Path) -> Option<String> {
    let name = path.file_stem()?.to_str()?.to_ascii_lowercase();
    Some(name.strip_prefix("_.").map_or_else(|| name.clone(), |rest| format!("*.{rest}")))
}

fn stamps(files: &Files) -> Stamps {
    let mut paths = vec![files.certificate.clone(), files.key.clone()];
    // One that cannot be listed is told when it is read.
    for path in files.directory.as_deref().map(listed).and_then(Result::ok).unwrap_or_default() {
        paths.push(path.with_extension("key"));
        paths.push(path);
    }
    let stamp = |path: &PathBuf| {
        let metadata = std::fs::metadata(path).ok()?;
        Some((metadata.ino(), metadata.len(), metadata.modified().ok()?))
    };
    paths.into_iter().map(|path| (path.clone(), stamp(&path))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes a pair for a name, and returns the certificate.
    fn write(directory: &Path, file: &str, name: &str) -> CertificateDer<'static> {
        let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
        std::fs::write(directory.join(format!("{file}.key")), made.signing_key.serialize_pem()).unwrap();
        std::fs::write(directory.join(format!("{file}.crt")), made.cert.pem()).unwrap();
        made.cert.der().clone()
    }

    fn shown(certificates: &Certificates, name: Option<&str>) -> CertificateDer<'static> {
        certificates.find(name).cert[0].clone()
    }

    #[test]
    fn names_choose_certificates_and_new_ones_come_into_use() {
        let directory = tempfile::tempdir().unwrap();
        let named = directory.path().join("named");
        std::fs::create_dir(&named).unwrap();
        let default = write(directory.path(), "server", "gate.example");
        let own = write(&named, "app.example", "app.example");
        let wild = write(&named, "_.apps.example", "*.apps.example");
        // Half a pair, and one that is none.
        std::fs::write(named.join("half.example.crt"), "").unwrap();
        let files = Files {
            certificate: directory.path().join("server.crt"),
            key: directory.path().join("server.key"),
            directory: Some(named.clone()),
        };
        let certificates = Certificates::load(files.clone()).unwrap();
        assert_eq!(shown(&certificates, None), default);
        assert_eq!(shown(&certificates, Some("App.Example")), own);
        assert_eq!(shown(&certificates, Some("a.apps.example")), wild);
        for other in ["b.a.apps.example", "half.example", "app.example.org", "example"] {
            assert_eq!(shown(&certificates, Some(other)), default, "{other}");
        }
        certificates.server().unwrap();

        let renewed = write(&named, "app.example", "app.example");
        // The clock of files may stand still for as long as all this takes.
        let file = std::fs::File::options().write(true).open(named.join("app.example.crt")).unwrap();
        file.set_modified(SystemTime::now() + LOOK).unwrap();
        certificates.refresh(false);
        assert_eq!(shown(&certificates, Some("app.example")), renewed);
        // A key that belongs to another: what was in use stays.
        write(&named, "other.example", "other.example");
        std::fs::copy(named.join("other.example.key"), named.join("app.example.key")).unwrap();
        std::fs::write(files.certificate, "nothing").unwrap();
        certificates.refresh(true);
        assert_eq!(shown(&certificates, Some("app.example")), renewed);
        assert_eq!(shown(&certificates, None), default);
    }

    #[test]
    fn the_names_that_the_default_certificate_has_in_full_are_known() {
        let directory = tempfile::tempdir().unwrap();
        let names = ["Gate.example", "*.apps.example", "api.example", "0.0.0.0"].map(str::to_owned);
        let made = rcgen::generate_simple_self_signed(names).unwrap();
        let files = Files {
            certificate: directory.path().join("server.crt"),
            key: directory.path().join("server.key"),
            directory: None,
        };
        std::fs::write(&files.certificate, made.cert.pem()).unwrap();
        std::fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
        let certificates = Certificates::load(files).unwrap();
        assert!(
            certificates.names_by_default("gate.example") && certificates.names_by_default("api.example")
        );
        for other in ["x.gate.example", "x.apps.example", "*.apps.example", "apps.example", "0.0.0.0"] {
            assert!(!certificates.names_by_default(other), "{other}");
        }
        write(directory.path(), "server", "new.example");
        certificates.refresh(true);
        assert!(
            certificates.names_by_default("new.example") && !certificates.names_by_default("gate.example")
        );
    }

    #[test]
    fn a_gateway_without_a_certificate_does_not_start() {
        let directory = tempfile::tempdir().unwrap();
        let files = Files {
            certificate: directory.path().join("server.crt"),
            key: directory.path().join("server.key"),
            directory: None,
        };
        assert!(matches!(Certificates::load(files), Err(TlsError::Pair { .. })));
    }
}
