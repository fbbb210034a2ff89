//! The errno values of the host by name.

use rustix::io::Errno as Host;

/// The errno values of the host. Each constant has the host's name without the leading `E`, except [`Errno::TOOBIG`].
#[derive(Debug)]
pub enum Errno {}

macro_rules! errnos {
    ($($name:ident)*) => {
        impl Errno {
            $(
                #[doc = concat!("`E", stringify!($name), "`.")]
                pub const $name: i32 = Host::$name.raw_os_error();
            )*

            /// `EACCES`.
            pub const ACCES: i32 = Host::ACCESS.raw_os_error();

            /// `E2BIG`.
            pub const TOOBIG: i32 = Host::TOOBIG.raw_os_error();

            /// The name of an errno value, with its leading `E`; `None` for a value that is not in this list.
            pub fn name(errno: i32) -> Option<&'static str> {
                match errno {
                    $(Self::$name => Some(concat!("E", stringify!($name))),)*
                    Self::ACCES => Some("EACCES"),
                    Self::TOOBIG => Some("E2BIG"),
                    _ => None,
                }
            }
        }
    };
}

errnos! {
    PERM NOENT INTR IO NXIO BADF AGAIN NOMEM BUSY EXIST XDEV NODEV NOTDIR ISDIR INVAL NFILE MFILE
    TXTBSY FBIG NOSPC SPIPE ROFS PIPE RANGE DEADLK NAMETOOLONG NOSYS LOOP OPNOTSUPP PROTO
    ADDRINUSE CONNREFUSED CONNRESET TIMEDOUT SHUTDOWN STALE DQUOT NOMEDIUM CANCELED
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_errno_value_has_the_name_of_its_constant() {
        assert_eq!((Errno::NOSPC, Errno::name(28)), (28, Some("ENOSPC")));
        assert_eq!(Errno::name(0), None);
    }
}
