// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/sidecar/connectors"
)

// way settles how the request is served; it is wayAggregated whenever something rules prefill elsewhere out.
func (r *run) way() way {
	var ok bool
	r.wire, ok = r.s.wire(r.engine())
	pick := r.j.Decision.Phase(scheduler.PhasePrefill)
	switch {
	case !pick.Wanted && len(pick.Ranked) == 0, r.s.Mode == modeOff, !r.allowed(ok):
		return wayAggregated
	case r.delegates():
		return wayHeaders
	case !ok, !r.carries(), r.wire.NeedsDecode && r.j.Decode == nil:
		return wayAggregated
	default:
		return wayOrchestrate
	}
}

// allowed reports whether nothing about the request rules prefill elsewhere out; known says that there is a wire.
func (r *run) allowed(known bool) bool {
	bars := ^inference.Bar(0)
	if known {
		bars = r.wire.Bars | inference.BarNotJSON
	}
	return r.j.Body != nil && r.j.Request.Bars&bars == 0 &&
		(!r.j.Request.HasTransferFields || !r.s.AcceptClientTransferFields) // else the caller does it
}

// carries reports whether the wire can be spliced into the request.
func (r *run) carries() bool {
	return r.allowed(true) && r.wire.Connector != nil && r.wire.Serves(r.j.Request.API) && (!r.wire.OneChoice || r.j.Request.N <= 1)
}

// beside reports whether prefill and decode run at the same time.
func (r *run) beside() bool {
	return r.wire.Shape == connectors.Rendezvous || r.wire.Overlaps && r.s.ParallelLegs
}

// NeedsPrefill reports whether a decode endpoint cannot serve a prompt that was not prefilled elsewhere: its label says
// that it only decodes, and its engine's connector has no way back (connectors.Traits.Aggregates).
func (o *Orchestrator) NeedsPrefill(decode *pool.Endpoint) bool {
	s := o.settings.Load()
	if s.Mode == modeOff || s.Mode == modeHeaders || s.Mode == modeAuto && decode.Sidecar == pool.SidecarPresent {
		return false
	}
	w, ok := s.wire(decode.Engine)
	return ok && !w.Aggregates && decode.Role != 0 && !decode.Role.Has(pool.RolePrefill)
}

// engine is the decode endpoint's or, while there is none, the first prefiller's: it says which wire is spoken.
func (r *run) engine() string {
	if r.j.Decode != nil {
		return r.j.Decode.Engine
	}
	if ranked := r.j.Decision.Phase(scheduler.PhasePrefill).Ranked; len(ranked) > 0 {
		return ranked[0].Endpoint.Engine
	}
	return ""
}
