//! Configuration and database: the options that `serve`, `orgs` and `keys` share, and opening the database beside a host that may be running.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use turnhouse::config::{Config, DatabaseUrl};
use turnhouse::store::postgres::{PostgresOptions, PostgresStore};
use turnhouse::store::sqlite::{SqliteOptions, SqliteStore};
use turnhouse::store::{Store, StoreError};

use super::{CliError, Result};

/// Where a host's data is.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Data")]
pub struct DataArgs {
    /// Where the database, the module cache and the keys lie; ./turnhouse-data unless configured
    #[arg(long, value_name = "DIR", env = "TURNHOUSE_DATA_DIR")]
    data_dir: Option<PathBuf>,

    /// `postgres://user:password@host/database`, for one or several hosts; SQLite in the data directory when there is none
    #[arg(long, value_name = "URL", env = "TURNHOUSE_DATABASE_URL", hide_env_values = true)]
    database_url: Option<DatabaseUrl>,

    /// A configuration file; turnhouse.toml in the data directory when there is one
    #[arg(long, value_name = "FILE", env = "TURNHOUSE_CONFIG")]
    config: Option<PathBuf>,
}

impl DataArgs {
    /// What the command line says, over file and environment.
    pub fn overrides(&self) -> Vec<(&'static str, figment::value::Value)> {
        let mut overrides = Vec::new();
        if let Some(data_dir) = &self.data_dir {
            overrides.push(("data_dir", data_dir.to_string_lossy().into_owned().into()));
        }
        if let Some(url) = &self.database_url {
            overrides.push(("database_url", url.as_str().into()));
        }
        overrides
    }

    /// The file that is named, or the one that lies in the data directory.
    pub fn config_file(&self) -> Option<PathBuf> {
        self.config.clone().or_else(|| {
            let data_dir = self.data_dir.clone().unwrap_or_else(|| Config::default().data_dir);
            Some(data_dir.join("turnhouse.toml")).filter(|file| file.is_file())
        })
    }

    /// Opens the database for administration: also while its host is running.
    pub async fn open(&self) -> Result<Arc<dyn Store>> {
        open(&self.load()?, false).await
    }

    /// Opens the database as the role that owns it, and mends its schema.
    pub async fn migrate(&self) -> Result<Arc<dyn Store>> {
        open(&self.load()?, true).await
    }

    /// The configuration, as a host would have it.
    pub fn load(&self) -> Result<Config> {
        load_config(self.config_file().as_deref(), self.overrides())
    }
}

/// Loads the configuration; whatever is wrong with it was written by the user.
pub fn load_config(file: Option<&Path>, overrides: Vec<(&'static str, figment::value::Value)>) -> Result<Config> {
    Config::load(file, overrides).map_err(|error| {
        CliError::usage(format!("the configuration is wrong: {error:#}"))
            .help("settings come from --config, TURNHOUSE_* variables and the command line, in this order")
    })
}

async fn open(config: &Config, mends: bool) -> Result<Arc<dyn Store>> {
    if let Some(url) = &config.database_url {
        let options = PostgresOptions { connections: 1, ..PostgresOptions::new(url.as_str()) };
        let opened = if mends { PostgresStore::migrate(options).await } else { PostgresStore::open(options).await };
        return Ok(Arc::new(opened.map_err(failed)?));
    }
    let options = SqliteOptions { readers: 1, ..SqliteOptions::new(&config.data_dir) };
    let store = SqliteStore::open_admin(options).await.map_err(failed)?;
    Ok(Arc::new(store))
}

/// The store's failure, with what to do. Where it says that itself, behind its last semicolon, it knows better.
pub fn failed(error: StoreError) -> CliError {
    let text = error.to_string();
    if let Some((what, advice)) = text.rsplit_once("; ") {
        return CliError::failed(what).help(advice);
    }
    let help = match &error {
        StoreError::InUse(_) => "end the host that uses the data directory, or choose another --data-dir",
        StoreError::Unavailable(_) => {
            "does the database answer, with room left on its disk? see --data-dir and --database-url"
        }
        StoreError::NewerSchema { .. } => "install the turnhouse that last used this database, or a newer one",
        StoreError::Corrupt(_) => "keep a copy of the database before anything else",
    };
    CliError::failed(text).help(help)
}

#[cfg(test)]
mod tests {
    use super::super::output::Style;
    use super::*;

    #[test]
    fn what_the_store_advises_is_the_help() {
        let error = failed(StoreError::InUse("another turnhouse uses data; stop it".into())).render(Style::plain());
        assert_eq!(error, "error: another turnhouse uses data\n  help: stop it");
        let error = failed(StoreError::Corrupt("a snapshot".into())).render(Style::plain());
        assert!(error.contains("a snapshot") && error.contains("keep a copy"), "{error}");
    }
}
