//! Live migration that sends references in place of pages which lie on shared storage.
//!
//! `dom0-migrator` is the save helper that libxl starts (`LIBXL_SAVE_HELPER`), and the two commands that migrate with it.
//!
//! * [`helper`]: the save helper itself: libxl's messages on one side, libxenguest on the other;
//! * [`engine`]: what stands in the stream between libxenguest and the network;
//! * [`lists`], [`disks`]: what the guest tells of its pages, and where the domain's disks are ([`stream_head`] has them for
//!   the target);
//! * [`command`]: `migrate` and `receive`, which run `xl` with this program as its helper; [`control`] is what they say to
//!   each other, [`handoff`] what they say to the helpers, [`report`] what comes of it;
//! * [`inquiry`]: what `check` asks a target;
//! * [`offer`]: how two helpers find each other that none of these commands has started;
//! * [`handover`]: which side may run the domain, written down on both before it is done;
//! * [`examination`]: what `doctor` asks another host;
//! * [`timeline`], [`memory_map`]: what is seen of a migration from second to second and page by page;
//! * [`xen`], [`xenstore`]: Xen's libraries and its tree of values.

pub mod command;
pub mod control;
pub mod disks;
pub mod engine;
pub mod examination;
pub mod handoff;
pub mod handover;
pub mod helper;
pub mod html;
pub mod inquiry;
pub mod lists;
pub mod memory_map;
pub mod offer;
pub mod parcel;
pub mod report;
pub mod report_file;
pub mod stream_head;
pub mod timeline;
pub mod xen;
pub mod xenstore;
