//! Configuration: a TOML file and the environment → a checked [`Config`]. Nothing else reads either.
//!
//! In order, later wins: defaults, the file (`--config`, or `turnhouse.toml` in the data directory), `TURNHOUSE_*` variables (`__` goes a level
//! down: `TURNHOUSE_LIMITS__HOST_RUNNING_MAX=200`), the command line.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use figment::Figment;
use figment::providers::{Env, Format, Serialized, Toml};
use serde::{Deserialize, Serialize};

use crate::limits::Limits;
use crate::oidc;

/// A host's configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where the gateway listens.
    pub listen: SocketAddr,
    /// Where `/metrics` listens; loopback by default, because it counts tenants. Port 0 takes a free one.
    pub metrics_listen: SocketAddr,
    /// Where the database, the module cache and the keys of this host live.
    pub data_dir: PathBuf,
    /// `postgres://…`; the embedded SQLite when it is absent.
    pub database_url: Option<DatabaseUrl>,
    /// Connections to PostgreSQL at most. None is held while a guest runs, so a few serve any number of turns.
    pub database_connections: u32,
    /// The same database past any pooler: over one connection there the hosts hear of each other's writes at once. Needed only where `database_url` is a
    /// pooler's.
    pub database_listen_url: Option<DatabaseUrl>,
    /// Under which clients reach this host; for links in messages.
    pub public_url: Option<String>,
    /// Certificate and key; without them the gateway speaks plain HTTP, for a proxy that terminates TLS.
    pub tls: Option<TlsFiles>,
    /// Web pages of these origins may call from a browser: `https://app.example.org`. None, unless they are named.
    pub cors_origins: Vec<String>,
    /// Memory for the whole host, bytes. When set, `limits.host_running_max` and `keep_resident_bytes` follow from it.
    pub memory_budget_bytes: Option<u64>,
    /// Linear memory that a pool slot keeps between turns, bytes. More is faster and costs `host_running_max` times as much.
    pub keep_resident_bytes: usize,
    /// Threads for guests; 0 takes the number of cores.
    pub guest_threads: usize,
    /// Whether a request whose `Host` header names no loopback host is refused. `turnhouse dev` sets it.
    pub loopback_only: bool,
    /// This program's file, for compiling modules in a process of its own. No setting: whoever is that program sets it.
    #[serde(skip)]
    pub compiler: Option<PathBuf>,
    /// Issuers whose tokens are taken beside API keys, by names of the operator's: `[oidc.<name>]`.
    pub oidc: BTreeMap<String, oidc::Settings>,
    /// Bounds.
    pub limits: Limits,
}

/// Where a certificate lies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// The host's own certificate and then its issuers', PEM.
    pub certificate: PathBuf,
    /// The certificate's private key, PEM. Nobody else's to read.
    pub key: PathBuf,
}

/// A database's address. May hold a password: never printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DatabaseUrl(String);

impl DatabaseUrl {
    /// For whoever connects.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<String> for DatabaseUrl {
    fn from(text: String) -> DatabaseUrl {
        DatabaseUrl(text)
    }
}

impl std::fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("…")
    }
}

impl Default for Config {
    fn default() -> Self {
        Config {
            listen: ([127, 0, 0, 1], 8787).into(),
            metrics_listen: ([127, 0, 0, 1], 9787).into(),
            data_dir: PathBuf::from("turnhouse-data"),
            database_url: None,
            database_connections: 10,
            database_listen_url: None,
            public_url: None,
            tls: None,
            cors_origins: Vec::new(),
            memory_budget_bytes: None,
            keep_resident_bytes: 256 * 1024,
            guest_threads: 0,
            loopback_only: false,
            compiler: None,
            oidc: BTreeMap::new(),
            limits: Limits::default(),
        }
    }
}

/// Variables that belong to the command line's clients and the tests, not to a host's configuration.
const NOT_OURS: &[&str] = &["TURNHOUSE_URL", "TURNHOUSE_API_KEY", "TURNHOUSE_LOG", "TURNHOUSE_CONFIG"];

impl Config {
    /// Reads and checks. The error names the setting and where it came from.
    pub fn load(file: Option<&Path>, overrides: Vec<(&str, figment::value::Value)>) -> anyhow::Result<Config> {
        let mut figment = Figment::from(Serialized::defaults(Config::default()));
        if let Some(file) = file {
            anyhow::ensure!(file.is_file(), "the configuration file {} does not exist", file.display());
            figment = figment.merge(Toml::file_exact(file));
        }
        let not_ours: Vec<&str> = NOT_OURS.iter().filter_map(|name| name.strip_prefix("TURNHOUSE_")).collect();
        figment = figment.merge(
            Env::prefixed("TURNHOUSE_")
                .filter(move |key| !key.starts_with("test_") && !not_ours.iter().any(|n| key == *n))
                .split("__"),
        );
        for (key, value) in overrides {
            figment = figment.merge((key, value));
        }
        let config: Config = figment.extract()?;
        config.limits.check().map_err(anyhow::Error::msg)?;
        config.cors_origins.iter().try_for_each(|origin| check_origin(origin))?;
        let mut issuers = BTreeMap::new();
        for (name, issuer) in &config.oidc {
            issuer.check(name).map_err(anyhow::Error::msg)?;
            if let Some(other) = issuers.insert(&issuer.issuer, name) {
                anyhow::bail!("oidc.{other} and oidc.{name} trust the same issuer, {}; say it once", issuer.issuer);
            }
        }
        Ok(config)
    }
}

/// An origin as browsers write it: scheme, host and port, in lower case. `*` would let every page that a key's holder looks at use it.
fn check_origin(origin: &str) -> anyhow::Result<()> {
    let rest = origin.strip_prefix("https://").or_else(|| origin.strip_prefix("http://")).unwrap_or_default();
    let host = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-:[]".contains(&b);
    anyhow::ensure!(
        !rest.is_empty() && rest.bytes().all(host),
        "cors_origins: {origin:?} is no origin; write each as a browser does, scheme, host and port and nothing else: \"https://app.example.org\""
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_in_the_databases_address_is_not_printed() {
        let config = Config::load(None, vec![("database_url", "postgres://ann:secret@db/turnhouse".into())]).unwrap();
        assert_eq!(config.database_url.as_ref().unwrap().as_str(), "postgres://ann:secret@db/turnhouse");
        assert!(!format!("{config:?}").contains("secret"));
        let wrong = Config::load(None, vec![("database_url", 7_i64.into())]).unwrap_err().to_string();
        assert!(wrong.contains("database_url"), "{wrong}");
    }

    #[test]
    fn origins_are_listed_and_never_all() {
        let load =
            |origin: &str| Config::load(None, vec![("cors_origins", vec![origin].into())]).map(|c| c.cors_origins);
        for good in ["https://app.example.org", "http://localhost:3000", "http://[::1]:3000"] {
            assert_eq!(load(good).unwrap(), [good]);
        }
        for bad in [
            "*",
            "https://*.example.org",
            "null",
            "",
            "https://",
            "app.example.org",
            "https://a/",
            "https://A",
            "https://a\r\nx",
        ] {
            let error = load(bad).unwrap_err().to_string();
            assert!(error.contains("cors_origins"), "{bad}: {error}");
        }
    }

    #[test]
    fn an_issuer_is_checked_and_an_unknown_setting_of_it_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("turnhouse.toml");
        let load = |more: &str| {
            let text =
                format!("[oidc.main]\nissuer = \"https://id.example.org\"\naudiences = [\"turnhouse\"]\n{more}\n");
            std::fs::write(&file, text).unwrap();
            Config::load(Some(&file), vec![]).map_err(|error| error.to_string())
        };
        let config = load("org_claim = \"org\"\nscopes = { member = [\"turns\"] }").unwrap();
        assert_eq!(config.oidc["main"].user_claim, "sub");
        load("").expect("whose org a token is for, its user's memberships say");
        for (more, says) in [
            ("org = \"acme\"\norg_claim = \"org\"", "org_claim"),
            ("org = \"acme\"\nalgorithms = [\"HS256\"]", "HS256"),
            ("org = \"acme\"\nscopes = { member = [\"root\"] }", "root"),
            ("org = \"../acme\"", "org"),
            ("org = \"acme\"\naudience = \"x\"", "audience"),
            (
                "[oidc.second]\nissuer = \"https://id.example.org\"\naudiences = [\"other\"]",
                "oidc.main and oidc.second trust the same issuer",
            ),
        ] {
            let error = load(more).unwrap_err();
            assert!(error.contains(says), "{more}: {error}");
        }
    }

    #[test]
    fn a_file_sets_limits_and_an_unknown_setting_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("turnhouse.toml");
        std::fs::write(&file, "listen = \"127.0.0.1:9\"\n[limits]\nhost_running_max = 7\n").unwrap();
        let config = Config::load(Some(&file), vec![("data_dir", "elsewhere".into())]).unwrap();
        assert_eq!(config.listen.port(), 9);
        assert_eq!(config.limits.host_running_max, 7);
        assert_eq!(config.data_dir, PathBuf::from("elsewhere"));
        std::fs::write(&file, "[limits]\nhost_runing_max = 7\n").unwrap();
        let error = Config::load(Some(&file), vec![]).unwrap_err().to_string();
        assert!(error.contains("host_runing_max"), "{error}");
    }
}
