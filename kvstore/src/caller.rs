//! Who calls: the namespace whose blocks they use, how that was proven, and what they may do. A listener makes one for everybody
//! who comes through it; no request can change it.

use kvstore_tiers::host::NamespaceId;
use tonic::Status;

/// How a caller proved who they are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Proof {
    /// They came through a Unix socket that only this user may connect to.
    Socket,
    /// They came through a loopback address, which every process of this machine may do.
    Loopback,
}

/// What a caller may do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rights {
    /// Use the blocks of their namespace.
    pub blocks: bool,
    /// Administer the daemon.
    pub admin: bool,
}

impl Rights {
    /// All of them: whoever reaches a listener of this version may do everything.
    pub const ALL: Self = Self { blocks: true, admin: true };
}

/// See the head of this file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Caller {
    /// Whose blocks they use.
    pub namespace: NamespaceId,
    /// How that was proven.
    pub proof: Proof,
    /// What they may do.
    pub rights: Rights,
}

impl Caller {
    /// Whether they may use blocks.
    pub fn check_blocks(&self) -> Result<(), Status> {
        self.check(self.rights.blocks, "use blocks")
    }

    /// Whether they may administer the daemon.
    pub fn check_admin(&self) -> Result<(), Status> {
        self.check(self.rights.admin, "administer this daemon")
    }

    fn check(&self, may: bool, what: &str) -> Result<(), Status> {
        match may {
            true => Ok(()),
            false => {
                Err(Status::permission_denied(format!("callers of this listener may not {what}: use another one")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caller_may_do_what_their_rights_say() {
        let caller = |rights| Caller { namespace: NamespaceId(0), proof: Proof::Socket, rights };
        let reader = caller(Rights { blocks: true, admin: false });
        assert!(reader.check_blocks().is_ok());
        let refused = reader.check_admin().unwrap_err();
        assert_eq!(refused.code(), tonic::Code::PermissionDenied);
        assert!(refused.message().contains("administer"), "{refused}");
        let operator = caller(Rights { blocks: false, admin: true });
        assert!(operator.check_admin().is_ok() && operator.check_blocks().is_err());
        let all = caller(Rights::ALL);
        assert!(all.check_admin().is_ok() && all.check_blocks().is_ok());
    }
}
