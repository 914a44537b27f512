//! The TUN device: one open file for each queue. It exists as long as one of them is open, so nothing of it outlives this process.
//!
//! **Source** — Documentation/networking/tuntap.rst; uapi/linux/if_tun.h.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::offload::NOTHING;
use crate::words::name::LinkName;

/// Where TUN devices come from.
pub(in crate::run) const CONTROL: &str = "/dev/net/tun";

const IFF_TUN: u16 = 0x0001;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const IFF_TUN_EXCL: u16 = 0x8000;

const TUN_F_CSUM: libc::c_ulong = 0x01;
const TUN_F_TSO4: libc::c_ulong = 0x02;
const TUN_F_TSO_ECN: libc::c_ulong = 0x08;
const TUN_F_USO4: libc::c_ulong = 0x20;
const TUN_F_USO6: libc::c_ulong = 0x40;

/// _IOW('T', 202, int), _IOW('T', 208, unsigned int), _IOR('T', 210, unsigned int)
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;

/// `struct ifreq` as TUNSETIFF reads it.
#[repr(C)]
struct Ifreq {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// Why a device could not be opened.
pub(in crate::run) enum Refused {
    /// There is nothing that makes TUN devices.
    Control,
    /// The name is somebody else's.
    Taken,
    /// Anything else.
    Other,
}

impl Refused {
    pub(in crate::run) fn of(error: &io::Error) -> Self {
        match error.raw_os_error() {
            _ if !std::path::Path::new(CONTROL).exists() => Self::Control,
            Some(libc::ENODEV | libc::ENXIO | libc::EACCES) => Self::Control,
            Some(libc::EBUSY | libc::EEXIST) => Self::Taken,
            _ => Self::Other,
        }
    }
}

/// What a device hands over uncut.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(in crate::run) enum Offload {
    /// Nothing: every packet is whole and fits the MTU.
    Nothing,
    /// Checksums not written.
    Checksums,
    /// And large TCP packets.
    Tcp,
    /// And large UDP packets (Linux 6.2).
    TcpAndUdp,
}

/// A queue of a TUN device.
#[derive(Debug)]
pub(in crate::run) struct Queue {
    file: File,
    /// Whether packets are preceded by a header that says what is left to do.
    pub(in crate::run) headers: bool,
}

impl Queue {
    /// Makes the device, which must not exist yet, and opens its first queue.
    pub(in crate::run) fn create(name: LinkName, several: bool, headers: bool) -> io::Result<Self> {
        Self::open(name, IFF_TUN_EXCL | if several { IFF_MULTI_QUEUE } else { 0 }, headers)
    }

    /// Opens one more queue of a device that has several.
    pub(in crate::run) fn another(name: LinkName, headers: bool) -> io::Result<Self> {
        Self::open(name, IFF_MULTI_QUEUE, headers)
    }

    fn open(name: LinkName, flags: u16, headers: bool) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(CONTROL)?;
        let headers_flag = if headers { IFF_VNET_HDR } else { 0 };
        let mut request =
            Ifreq { name: [0; 16], flags: IFF_TUN | IFF_NO_PI | headers_flag | flags, rest: [0; 22] };
        // A link's name is shorter than the field.
        for (place, byte) in request.name.iter_mut().zip(name.as_str().bytes()) {
            *place = byte;
        }
        #[expect(unsafe_code, reason = "TUN devices are made by ioctl only")]
        // SAFETY: the request is a whole `struct ifreq` that outlives the call.
        check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) })?;
        Ok(Self { file, headers })
    }

    /// Asks for as much as the kernel can, up to what is wanted.
    pub(in crate::run) fn offload(&self, most: Offload) -> Offload {
        let tcp = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO_ECN;
        let wishes = [
            (Offload::TcpAndUdp, tcp | TUN_F_USO4 | TUN_F_USO6),
            (Offload::Tcp, tcp),
            (Offload::Checksums, TUN_F_CSUM),
        ];
        let granted = |flags: libc::c_ulong| {
            #[expect(unsafe_code, reason = "offloads of TUN devices are set by ioctl only")]
            // SAFETY: the argument is a number.
            check(unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETOFFLOAD, flags) }).is_ok()
        };
        let found =
            wishes.into_iter().find(|(offload, flags)| self.headers && *offload <= most && granted(*flags));
        found.map_or(Offload::Nothing, |(offload, _)| offload)
    }

    /// Whether the device still exists.
    pub(in crate::run) fn is_attached(&self) -> bool {
        let mut request = Ifreq { name: [0; 16], flags: 0, rest: [0; 22] };
        #[expect(unsafe_code, reason = "whether a TUN device is gone is asked by ioctl")]
        // SAFETY: the request is a whole `struct ifreq` that outlives the call.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), TUNGETIFF, &raw mut request) }).is_ok()
    }

    /// Reads a packet with what precedes it, without waiting.
    pub(in crate::run) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(buffer)
    }

    /// Writes a packet of which nothing is left to do.
    pub(in crate::run) fn write(&self, packet: &[u8]) -> io::Result<()> {
        match self.headers {
            true => self.write_parts(&[IoSlice::new(&NOTHING), IoSlice::new(packet)]),
            false => self.write_parts(&[IoSlice::new(packet)]),
        }
    }

    /// Writes a packet in parts, the header that precedes it among them.
    pub(in crate::run) fn write_parts(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        (&self.file).write_vectored(parts).map(|_| ())
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
