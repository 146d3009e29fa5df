//! The kinds of lab: what kind of guest it has, and the hosts that can move such a guest.

/// A kind of guest with its hosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Flavour {
    /// A PV guest, on Debian 12 with Xen 4.17: the last Xen of Debian with shadow paging, which the live migration of a PV guest needs
    #[default]
    Pv,
    /// A PVH guest, on Debian 13 with Xen 4.20, through hardware-assisted paging
    Pvh,
    /// An HVM guest with its device model, on the hosts of the PVH guest and that device model's packages
    Hvm,
    /// A PV guest as in the first, all three machines whole Debian 12 systems: systemd, dpkg, sshd. For what is installed and operated
    Debian,
}

impl Flavour {
    /// Its name, as on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pv => "pv",
            Self::Pvh => "pvh",
            Self::Hvm => "hvm",
            Self::Debian => "debian",
        }
    }

    /// The Debian suite of the hosts and of the guest's kernel.
    pub const fn suite(self) -> &'static str {
        match self {
            Self::Pv | Self::Debian => "bookworm",
            Self::Pvh | Self::Hvm => "trixie",
        }
    }

    /// The suite's release of Xen, as its packages' names and directories have it.
    pub(super) const fn xen(self) -> &'static str {
        match self {
            Self::Pv | Self::Debian => "4.17",
            Self::Pvh | Self::Hvm => "4.20",
        }
    }

    /// The suite's Python, which comes with Xen's tools and is never started.
    pub(super) const fn python(self) -> &'static str {
        match self {
            Self::Pv | Self::Debian => "3.11",
            Self::Pvh | Self::Hvm => "3.13",
        }
    }

    /// A file of the PV lab's hosts, with this lab's Xen in it.
    pub(super) fn adapted(self, of_the_pv_lab: &str) -> String {
        of_the_pv_lab.replace(&format!("/xen-{}/", Self::Pv.xen()), &format!("/xen-{}/", self.xen()))
    }

    /// What `xl create` is told beside the guest's file, which is the PV guest's.
    pub(super) const fn overrides(self) -> &'static str {
        match self {
            Self::Pv | Self::Debian => "",
            Self::Pvh => " 'type=\"pvh\"'",
            Self::Hvm => HVM,
        }
    }

    /// Packages of its hosts beside those of every host.
    pub(super) const fn packages(self) -> &'static [&'static str] {
        match self {
            Self::Pv | Self::Pvh | Self::Debian => &[],
            Self::Hvm => &["qemu-system-xen", "seabios"],
        }
    }

    /// Whether its guest needs what Xen loads into a guest that boots as a computer does.
    pub(super) const fn has_firmware(self) -> bool {
        matches!(self, Self::Hvm)
    }

    /// Whether its machines are whole systems with a service manager and sshd.
    pub(super) const fn is_whole(self) -> bool {
        matches!(self, Self::Debian)
    }

    /// Whether the guest stands still while the lab is frozen: the state of a processor that is inside a hardware-assisted guest is more
    /// than QEMU is known to keep for an emulated one.
    pub(super) const fn is_frozen_paused(self) -> bool {
        matches!(self, Self::Pvh | Self::Hvm)
    }
}

/// The device model loads kernel and initrd, so there is no boot loader and no disk of one. Its devices are those that it has in any
/// case, and a serial port that leads nowhere; no screen, no network of its own. Not `nographic`, for then the BIOS takes the serial
/// port for its screen: under emulation it was still waiting for that port after 100 s. The guest's Linux unplugs the disk that the
/// device model shows it, and uses Xen's.
const HVM: &str = " 'type=\"hvm\"' 'device_model_version=\"qemu-xen\"' 'xen_platform_pci=1' 'serial=\"null\"' 'vga=\"none\"' \
                   'vnc=0' 'sdl=0' 'usb=0' 'vif=[\"mac=00:16:3e:00:00:16,bridge=br1,script=/lab/vif-bridge,type=vif\"]'";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pv_lab_s_files_are_as_they_stand() {
        let file = include_str!("files/dom0-init");
        assert_eq!(Flavour::Pv.adapted(file), file);
        assert_eq!((Flavour::Pv.overrides(), Flavour::Debian.overrides()), ("", ""));
        assert_eq!(Flavour::Debian.adapted(file), file);
        assert!(include_str!("files/db1.cfg").contains("\ntype = \"pv\"\n"));
    }

    #[test]
    fn another_lab_s_tools_are_found_where_its_xen_has_them() {
        let file = Flavour::Pvh.adapted(include_str!("files/dom0-init"));
        assert!(file.contains("/usr/lib/xen-4.20/bin:") && !file.contains("4.17"));
    }
}
