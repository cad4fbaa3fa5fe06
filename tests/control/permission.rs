//! Who may do what.

use std::thread;

use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use super::ask;
use super::work::{GROUP, Server};

/// Nobody that has a name.
const SOMEBODY: u32 = 54_322;

#[test]
fn others_may_look_and_members_of_the_group_may_do_all() {
    if !nix::unistd::geteuid().is_root() {
        return println!("not run: another user, for which root is needed");
    }
    let server = Server::start();
    // A thread can be another user, and a socket knows who connected it.
    let as_user = |groups: &'static [u32], gid: u32, method: &'static str, path: &'static str| {
        let socket = server.socket();
        let ask = move || {
            let groups: Vec<_> = groups.iter().map(|group| Gid::from_raw(*group)).collect();
            set_thread_groups(&groups).unwrap();
            let (gid, uid) = (Gid::from_raw(gid), Uid::from_raw(SOMEBODY));
            set_thread_res_gid(gid, gid, gid).unwrap();
            set_thread_res_uid(uid, uid, uid).unwrap();
            ask(&socket, method, path, "")
        };
        thread::spawn(ask).join().unwrap()
    };
    let (status, _, body) = as_user(&[1, 2, 3], SOMEBODY, "POST", "/v1/release");
    assert!(status == 403 && body.contains("control_group"), "{status} {body}");
    assert_eq!(as_user(&[], SOMEBODY, "DELETE", "/v1/leases/x").0, 403);
    assert_eq!(as_user(&[], SOMEBODY, "GET", "/v1/images").0, 200);
    assert_eq!(as_user(&[1, GROUP, 3], SOMEBODY, "POST", "/v1/release").0, 200);
    assert_eq!(as_user(&[], GROUP, "POST", "/v1/release").0, 200);
    assert_eq!(ask(&server.socket(), "POST", "/v1/release", "").0, 200);
}
