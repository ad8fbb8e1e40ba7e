//! TLS, where a certificate and its key are configured: read and checked at the start, and again when a file changes. A renewed certificate needs no
//! restart; one that is no good changes nothing and is told in the log.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use parking_lot::RwLock;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::config::TlsFiles;

/// For the handshake, from the first byte to the last.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// How often the files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// What connections are encrypted with now. Cheap to clone.
#[derive(Clone)]
pub struct Tls {
    files: Arc<TlsFiles>,
    config: Arc<RwLock<Arc<ServerConfig>>>,
}

impl Tls {
    /// Reads the files. The error names the one that is wrong, and what is wrong with it.
    pub fn load(files: &TlsFiles) -> Result<Tls> {
        let config = Arc::new(RwLock::new(read(files)?));
        Ok(Tls { files: Arc::new(files.clone()), config })
    }

    /// The handshake. `None`: the client did not keep to it, which is no error of ours.
    pub async fn accept(&self, stream: TcpStream) -> Option<TlsStream<TcpStream>> {
        let acceptor = TlsAcceptor::from(self.config.read().clone());
        match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => Some(stream),
            Ok(Err(error)) => {
                tracing::debug!(%error, "a TLS handshake failed");
                None
            }
            Err(_late) => {
                tracing::debug!("a TLS handshake took too long");
                None
            }
        }
    }

    /// Follows the files for as long as it is polled.
    pub async fn follow(self) {
        let mut seen = self.changed_at();
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let now = self.changed_at();
            // What was read too early, or half of it, is read again at the next change.
            if now != seen {
                seen = now;
                self.reload();
            }
        }
    }

    fn reload(&self) {
        match read(&self.files) {
            Ok(config) => {
                *self.config.write() = config;
                tracing::info!("the TLS certificate was read anew");
            }
            Err(error) => tracing::error!(error = format!("{error:#}"), "the TLS certificate that was in use stays"),
        }
    }

    fn changed_at(&self) -> [Option<SystemTime>; 2] {
        // Through links: what renews certificates often turns one to another file.
        [&self.files.certificate, &self.files.key]
            .map(|file| std::fs::metadata(file).and_then(|about| about.modified()).ok())
    }
}

fn read(files: &TlsFiles) -> Result<Arc<ServerConfig>> {
    let chain = text(&files.certificate, "tls.certificate")?;
    let chain: Vec<CertificateDer<'_>> = CertificateDer::pem_slice_iter(&chain)
        .collect::<Result<_, _>>()
        .with_context(|| format!("tls.certificate, {}, is no PEM", files.certificate.display()))?;
    ensure!(
        !chain.is_empty(),
        "tls.certificate, {}, holds no certificate; it must be PEM, the host's own first, then its issuers'",
        files.certificate.display()
    );
    let key = text(&files.key, "tls.key")?;
    // Of the error nothing is told but its kind: the file is a secret.
    let key = PrivateKeyDer::from_pem_slice(&key).map_err(|_| {
        anyhow::anyhow!("tls.key, {}, holds no private key in PEM; it must not be encrypted", files.key.display())
    })?;
    warn_if_open(&files.key);
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("TLS 1.2 and 1.3 cannot be had")?
        .with_no_client_auth()
        .with_single_cert(chain.into_iter().map(CertificateDer::into_owned).collect(), key)
        .with_context(|| {
            format!(
                "tls.certificate, {}, and tls.key, {}, do not go together",
                files.certificate.display(),
                files.key.display()
            )
        })?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

fn text(file: &Path, setting: &str) -> Result<Vec<u8>> {
    std::fs::read(file).with_context(|| format!("{setting}, {}, cannot be read", file.display()))
}

/// Whoever reads the key can be the host.
fn warn_if_open(key: &Path) {
    if is_open(key) {
        tracing::warn!(key = %key.display(), "everybody on this machine can read the TLS key; chmod 600 it");
    }
}

fn is_open(key: &Path) -> bool {
    std::fs::metadata(key).is_ok_and(|about| about.permissions().mode() & 0o004 != 0)
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A self-signed certificate for localhost and its key, in `dir`, and the certificate in PEM.
    pub fn files(dir: &Path) -> (TlsFiles, String) {
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let files = TlsFiles { certificate: dir.join("cert.pem"), key: dir.join("key.pem") };
        std::fs::write(&files.certificate, made.cert.pem()).unwrap();
        std::fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
        (files, made.cert.pem())
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said_and_the_key_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (good, _) = files(dir.path());
        assert!(Tls::load(&good).is_ok());
        let with = |name: &str, text: &str| {
            let file = dir.path().join(name);
            std::fs::write(&file, text).unwrap();
            file
        };
        let other = tempfile::tempdir().unwrap();
        let (other, _) = files(other.path());
        let key = std::fs::read_to_string(&good.key).unwrap();
        let cut = key.replace("-----END", "");
        for (files, says) in [
            (TlsFiles { certificate: dir.path().join("none"), ..good.clone() }, "none, cannot be read"),
            (TlsFiles { certificate: with("empty", ""), ..good.clone() }, "empty, holds no certificate"),
            (TlsFiles { certificate: good.key.clone(), ..good.clone() }, "holds no certificate"),
            (TlsFiles { key: with("cut", &cut), ..good.clone() }, "cut, holds no private key"),
            (TlsFiles { key: good.certificate.clone(), ..good.clone() }, "holds no private key"),
            (TlsFiles { key: other.key.clone(), ..good.clone() }, "do not go together"),
        ] {
            let error = format!("{:#}", Tls::load(&files).err().unwrap());
            assert!(error.contains(says), "{error}");
            assert!(!error.contains(key.lines().nth(1).unwrap()), "{error}");
        }
    }

    #[test]
    fn a_renewed_certificate_is_taken_up_and_a_bad_one_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let tls = Tls::load(&files(dir.path()).0).unwrap();
        let first = tls.config.read().clone();
        std::fs::write(&tls.files.certificate, "nonsense").unwrap();
        tls.reload();
        assert!(Arc::ptr_eq(&first, &tls.config.read()), "it stays");
        files(dir.path());
        tls.reload();
        assert!(!Arc::ptr_eq(&first, &tls.config.read()), "it is another");
    }

    #[test]
    fn a_key_that_everybody_can_read_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let (files, _) = files(dir.path());
        for (mode, open) in [(0o600, false), (0o640, false), (0o644, true)] {
            std::fs::set_permissions(&files.key, std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(is_open(&files.key), open, "{mode:o}");
        }
    }
}
