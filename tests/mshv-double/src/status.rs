//! Hypercall results and the errno that the driver makes of them.

use mshv_bindings::*;

/// A hypercall that failed: one of `HV_STATUS_*` (TLFS, "Hypercall Status Codes").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Status(pub(crate) u16);

macro_rules! statuses {
    ($($name:ident = $value:ident;)*) => {
        $(#[expect(non_upper_case_globals, reason = "named like variants")]
        pub(crate) const $name: Status = Status($value as u16);)*
    };
}

statuses! {
    InvalidHypercallInput = HV_STATUS_INVALID_HYPERCALL_INPUT;
    InvalidParameter = HV_STATUS_INVALID_PARAMETER;
    InvalidPartitionState = HV_STATUS_INVALID_PARTITION_STATE;
    OperationDenied = HV_STATUS_OPERATION_DENIED;
    UnknownProperty = HV_STATUS_UNKNOWN_PROPERTY;
    PropertyValueOutOfRange = HV_STATUS_PROPERTY_VALUE_OUT_OF_RANGE;
    InvalidVpIndex = HV_STATUS_INVALID_VP_INDEX;
    InvalidRegisterValue = HV_STATUS_INVALID_REGISTER_VALUE;
    OperationFailed = HV_STATUS_OPERATION_FAILED;
}

impl Status {
    /// The errno of `hv_result_to_errno` (drivers/hv/hv_common.c): a few codes become EINVAL, most EIO.
    pub(crate) fn errno(self) -> i32 {
        match u32::from(self.0) {
            HV_STATUS_INVALID_HYPERCALL_CODE
            | HV_STATUS_INVALID_HYPERCALL_INPUT
            | HV_STATUS_INVALID_PARAMETER
            | HV_STATUS_INVALID_PARTITION_ID
            | HV_STATUS_INVALID_VP_INDEX
            | HV_STATUS_INVALID_PORT_ID
            | HV_STATUS_INVALID_CONNECTION_ID
            | HV_STATUS_INVALID_LP_INDEX
            | HV_STATUS_INVALID_REGISTER_VALUE => libc::EINVAL,
            HV_STATUS_INSUFFICIENT_MEMORY => libc::ENOMEM,
            _ => libc::EIO,
        }
    }
}
