//! One message, with or without a descriptor, over a socket between the daemon and a helper.
#![allow(unsafe_code)]

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// Sends `message` and, with it, a copy of `fd`.
pub(super) fn send(socket: impl AsFd, message: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let fds: Vec<_> = fd.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &[] } else { &rights[..] };
    let parts = [IoSlice::new(message)];
    sendmsg::<()>(
        socket.as_fd().as_raw_fd(),
        &parts,
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}

/// Receives one message into `buffer`: its length in bytes, 0 when the other side is gone, and the descriptor that came
/// along. It is closed on exec.
pub(super) fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut control = nix::cmsg_space!([i32; 1]);
    let mut parts = [IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(
        socket.as_fd().as_raw_fd(),
        &mut parts,
        Some(&mut control),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut received = None;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            for fd in fds {
                // SAFETY: the kernel has just made this descriptor for this process, and nothing else knows its
                // number, so it is open and owned here alone.
                received = Some(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }
    Ok((message.bytes, received))
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;

    #[test]
    fn a_descriptor_arrives_with_its_message() {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (here, there) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        send(&here, b"one", Some(writer.as_fd())).unwrap();
        send(&here, b"two", None).unwrap();
        drop((here, writer));

        let mut buffer = [0; 8];
        let (length, fd) = receive(&there, &mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"one");
        let mut pipe = std::fs::File::from(fd.unwrap());
        io::Write::write_all(&mut pipe, b"x").unwrap();
        drop(pipe);
        let mut written = String::new();
        reader.read_to_string(&mut written).unwrap();
        assert_eq!(written, "x");

        let (length, fd) = receive(&there, &mut buffer).unwrap();
        assert_eq!((&buffer[..length], fd.is_none()), (&b"two"[..], true));
        assert_eq!(receive(&there, &mut buffer).unwrap().0, 0);
    }
}
