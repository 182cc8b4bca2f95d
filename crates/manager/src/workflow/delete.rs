//! Stub.
super::stub! { DeleteVm VmDelete }
