//! Where blobs come from and where the cache is: flags of the verbs that work beside a daemon, with its settings file.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;

use super::Failure;
use crate::config::{Config, Given};
use crate::control::Client;
use crate::ops::exit;

/// See the module's description.
#[derive(Debug, Args)]
pub struct Place {
    /// Settings file of the daemon [default: /etc/infill/config.toml, if it exists]
    #[arg(long, value_name = "FILE", env = "INFILL_CONFIG")]
    config: Option<PathBuf>,
    /// Directory where the kernel keeps its cache [default: as in the file, or /var/cache/infill]
    #[arg(long, value_name = "DIR", env = "INFILL_CACHE_DIR")]
    cache_dir: Option<PathBuf>,
    #[command(flatten)]
    daemon: DaemonPlace,
    /// Where blobs come from: dir:PATH or oci:PATH; several are asked in order [default: as in the file]
    #[arg(long = "store", value_name = "SPEC", env = "INFILL_STORE", value_delimiter = ',')]
    stores: Vec<String>,
}

/// Which daemon: flags of the verbs that ask one.
#[derive(Debug, Args)]
pub struct DaemonPlace {
    /// Directory with what the daemon notes for the next one, and its socket [default: as in the file, or /run/infill]
    #[arg(long, value_name = "DIR", env = "INFILL_STATE_DIR")]
    state_dir: Option<PathBuf>,
    /// Socket on which the daemon is asked [default: as in the file, or control.sock in the state directory]
    #[arg(long, value_name = "PATH", env = "INFILL_CONTROL_SOCKET")]
    control_socket: Option<PathBuf>,
}

/// A daemon and its settings file: flags of the verbs that need nothing else.
#[derive(Debug, Args)]
pub struct Asking {
    /// Settings file of the daemon [default: /etc/infill/config.toml, if it exists]
    #[arg(long, value_name = "FILE", env = "INFILL_CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    daemon: DaemonPlace,
}

impl Asking {
    /// The daemon.
    ///
    /// # Errors
    /// There is none, it does not answer, or the settings cannot be used.
    pub fn client(&self) -> Result<Client, Failure> {
        let given = Given::of_place(None, self.daemon.state_dir.clone(), self.daemon.control_socket.clone(), Vec::new());
        let config = given.look(self.config.as_deref()).map_err(|error| Failure::new(exit::BAD_CONFIGURATION, error))?;
        Ok(Client::connect(&config.control_socket)?)
    }
}

impl Place {
    /// The settings, in which there is a store at least.
    ///
    /// # Errors
    /// There is none, or the settings cannot be used.
    pub fn with_stores(&self) -> Result<Config, Failure> {
        self.given().resolve(self.config.as_deref()).map_err(|error| Failure::new(exit::BAD_CONFIGURATION, error))
    }

    /// The settings, perhaps without a store.
    ///
    /// # Errors
    /// They cannot be used.
    pub fn find(&self) -> Result<Config, Failure> {
        self.given().look(self.config.as_deref()).map_err(|error| Failure::new(exit::BAD_CONFIGURATION, error))
    }

    /// The same flags, for another verb.
    #[must_use]
    pub fn arguments(&self) -> Vec<OsString> {
        let DaemonPlace { state_dir, control_socket } = &self.daemon;
        let paths = [
            ("--config", &self.config),
            ("--cache-dir", &self.cache_dir),
            ("--state-dir", state_dir),
            ("--control-socket", control_socket),
        ];
        let paths = paths.into_iter().filter_map(|(flag, path)| Some([flag.into(), path.as_ref()?.into()])).flatten();
        paths.chain(self.stores.iter().flat_map(|store| ["--store".into(), store.into()])).collect()
    }

    fn given(&self) -> Given {
        let DaemonPlace { state_dir, control_socket } = &self.daemon;
        Given::of_place(self.cache_dir.clone(), state_dir.clone(), control_socket.clone(), self.stores.clone())
    }
}
