// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"fmt"
	"net/http"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/sidecar/connectors"
)

// Why a request is served by decode alone although the decision wanted a prefill elsewhere.
const (
	declinedCaller   = "the caller sent transfer fields, so it disaggregates by itself"
	declinedNoWire   = "no connector is configured for this engine (disaggregation.kvConnector): "
	declinedNoDecode = "the connector needs the decode endpoint before prefill: "
)

// What a wire may be unable to carry; the first two are followed by a name.
const (
	carriedAPI      = "requests of the API "
	carriedProperty = "the property "
	carriedChoices  = "n > 1"
)

// way settles how the request is served; it is wayAggregated whenever something rules prefill elsewhere out, and the
// outcome says what. [ErrNotCarried] means that decode cannot do without.
func (r *run) way() (way, error) {
	var ok bool
	r.wire, ok = r.s.wire(r.engine())
	pick := r.j.Decision.Phase(scheduler.PhasePrefill)
	if !pick.Wanted && len(pick.Ranked) == 0 || r.s.Mode == modeOff {
		return wayAggregated, nil
	}
	if r.callerDisaggregates() {
		return r.decline(declinedCaller)
	}
	what, delegated := r.barred(ok), r.delegates()
	if what == "" && delegated {
		return wayHeaders, nil
	}
	if !ok && !delegated {
		return r.decline(declinedNoWire + r.engine())
	}
	if what == "" {
		what = r.uncarried()
	}
	switch {
	case what != "":
		return r.notCarried(what)
	case r.wire.NeedsDecode && r.j.Decode == nil:
		return r.decline(declinedNoDecode + r.wire.Name)
	default:
		return wayOrchestrate, nil
	}
}

func (r *run) decline(reason string) (way, error) {
	r.out.WayReason = reason
	return wayAggregated, nil
}

// notCarried lets decode serve what the wire cannot carry, or refuses it where decode would fail in words that tell the
// client nothing. A body that was not read as one of an API's is none of ours to refuse.
func (r *run) notCarried(what string) (way, error) {
	name := "the sidecar of the decode endpoint" // no wire of ours is known for its engine
	if r.wire.Connector != nil {
		name = "the connector " + r.wire.Name
	}
	reason := name + " does not carry " + what
	req := r.j.Request
	if r.j.Body != nil && req.Bars&inference.BarNotJSON == 0 && req.API != inference.Unknown && req.Method == http.MethodPost &&
		r.j.Decode != nil && r.s.needsPrefill(r.j.Decode) {
		r.out.WayReason = reason
		return wayAggregated, fmt.Errorf("%w: %s", ErrNotCarried, reason)
	}
	return r.decline(reason)
}

// barred names the property of the request that rules prefill elsewhere out, "" for none; known says that there is a wire.
func (r *run) barred(known bool) string {
	bars := ^inference.Bar(0)
	if known {
		bars = r.wire.Bars | inference.BarNotJSON
	}
	switch bars &= r.j.Request.Bars; {
	case bars != 0:
		return carriedProperty + bars.String()
	case r.j.Body == nil:
		return carriedProperty + inference.BarNotJSON.String()
	default:
		return ""
	}
}

// uncarried names what else about the request the wire cannot carry.
func (r *run) uncarried() string {
	switch {
	case !r.wire.Serves(r.j.Request.API):
		return carriedAPI + r.j.Request.API.String()
	case r.wire.OneChoice && r.j.Request.N > 1:
		return carriedChoices
	default:
		return ""
	}
}

// carries reports whether the wire can be spliced into the request.
func (r *run) carries() bool {
	return r.wire.Connector != nil && r.barred(true) == "" && r.uncarried() == "" && !r.callerDisaggregates()
}

// callerDisaggregates reports whether the caller sent transfer fields, and may.
func (r *run) callerDisaggregates() bool {
	return r.j.Request.HasTransferFields && r.s.AcceptClientTransferFields
}

// beside reports whether prefill and decode run at the same time.
func (r *run) beside() bool {
	return r.wire.Shape == connectors.Rendezvous || r.wire.Overlaps && r.s.ParallelLegs
}

// NeedsPrefill reports whether a decode endpoint cannot serve a prompt that was not prefilled elsewhere: its label says
// that it only decodes, and its engine's connector has no way back (connectors.Traits.Aggregates).
func (o *Orchestrator) NeedsPrefill(decode *pool.Endpoint) bool {
	return o.settings.Load().needsPrefill(decode)
}

func (s *settings) needsPrefill(decode *pool.Endpoint) bool {
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
