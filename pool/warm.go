// SPDX-License-Identifier: Apache-2.0

package pool

import "sync/atomic"

// maxWarmSlots bounds the endpoints that can be remembered: half a kilobyte at each decode endpoint. Those in slots
// beyond it are never warm.
const maxWarmSlots = 4096

// Warm is the set of prefill endpoints that a decode endpoint has fetched blocks from: the next transfer between the two
// needs no handshake, which takes vLLM's NIXL connector some 5 s. Kept at the decode endpoint's state, by the prefill
// endpoint's slot. Safe for concurrent use, without locks. The zero value is the empty set.
type Warm struct {
	// Made by the first transfer and kept from then on: most endpoints never fetch, and the states that every decision
	// reads stay close together.
	bits atomic.Pointer[[maxWarmSlots / 64]atomic.Uint64]
}

// Add notes a transfer from the endpoint in slot.
func (w *Warm) Add(slot uint32) {
	if slot >= maxWarmSlots || w.Has(slot) {
		return
	}
	if w.bits.Load() == nil {
		w.bits.CompareAndSwap(nil, new([maxWarmSlots / 64]atomic.Uint64))
	}
	w.bits.Load()[slot/64].Or(1 << (slot % 64))
}

// Has reports whether there was one.
func (w *Warm) Has(slot uint32) bool {
	bits := w.bits.Load()
	return bits != nil && slot < maxWarmSlots && bits[slot/64].Load()&(1<<(slot%64)) != 0
}

// Forget is told that the endpoint in slot left or failed a transfer.
func (w *Warm) Forget(slot uint32) {
	if w.Has(slot) {
		w.bits.Load()[slot/64].And(^(uint64(1) << (slot % 64)))
	}
}

// ForgetSlot is told that the owner of slot left the pool: no living endpoint is warm with whoever gets the slot next.
func (s *Snapshot) ForgetSlot(slot uint32) {
	for _, e := range s.Endpoints {
		e.Warm.Forget(slot)
	}
}
