//! What the DSDT's hotplug of slots and of vCPUs has in common: registers of 32 bits with a bit for each thing that can come and go,
//! and the notifications that follow from them.

use acpi_tables::aml::{
    And, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Local,
    Notify, OpRegion, OpRegionSpace, Path,
};
use acpi_tables::{Aml, AmlSink};

/// Notification "device check" (ACPI 6.5, table 5.159): look what is there.
pub(super) const DEVICE_CHECK: u8 = 1;
/// Notification "eject request": let it go.
pub(super) const EJECT_REQUEST: u8 = 3;

/// Registers of 32 bits in a row from a port on, by their names.
pub(super) fn registers(region: &str, port: u16, names: &[[u8; 4]], sink: &mut dyn AmlSink) {
    // No row is longer: 63 registers.
    let len = (names.len() * 4) as u8;
    OpRegion::new(Path::new(region), OpRegionSpace::SystemIO, &port, &len).to_aml_bytes(sink);
    Field::new(
        Path::new(region),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        names
            .iter()
            .map(|&name| FieldEntry::Named(name, 32))
            .collect(),
    )
    .to_aml_bytes(sink);
}

/// Notifies a device if its bit is set in a local variable.
pub(super) struct Tell {
    /// The device.
    pub(super) who: String,
    /// Which bit.
    pub(super) bit: u32,
    /// Which local variable; the third is overwritten.
    pub(super) local: u8,
    /// The notification.
    pub(super) what: u8,
}

impl Aml for Tell {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let path = Path::new(&self.who);
        let (from, masked) = (Local(self.local), Local(2));
        And::new(&masked, &from, &self.bit).to_aml_bytes(sink);
        let notify = Notify::new(&path, &self.what);
        If::new(&Equal::new(&masked, &self.bit), vec![&notify]).to_aml_bytes(sink);
    }
}
