//! How a daemon is asked, told and scraped: HTTP/1.1 and JSON on a unix socket (docs/openapi.json says what), and text for
//! Prometheus on another one.
//!
//! | file | its subject |
//! |---|---|
//! | `wire` | what is said, as JSON |
//! | `routes` | what can be asked, and what is done for it |
//! | `peer` | who asks, and may |
//! | `jobs` | work that may block: on threads of its own, so many at a time |
//! | `server` | the thread `infill-control`: connections and their limits |
//! | `socket` | the sockets: bound, or passed by systemd |
//! | `client` | asking |
//!
//! Nothing here is on the way of a read. Whatever a client sends, it gets at one slow thread and a bounded number of others,
//! which give way to those that serve.

mod client;
mod jobs;
mod peer;
pub mod routes;
mod server;
mod socket;
pub mod wire;

pub use self::client::{Client, ClientError};
pub use self::peer::{Access, Peer};
pub use self::routes::{Daemon, Images, Kind, Metrics, Refusal};
pub use self::server::{CLIENTS_FDS, Listening, start};
pub use self::socket::{Listener, SocketError, Users, bind, group_id, listen_tcp, take_passed};
