// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/sidecar/connectors"
)

// maxEncoded bounds the different items of one request that are encoded apart; the raw media of the others stays.
const maxEncoded = 256

// What became of a media item.
const (
	itemEncoded      = "encoded"
	itemDeduplicated = "deduplicated" // equal to an earlier one of its request, and sent with it
	itemLocal        = "local"        // whoever uses it encodes it
	itemSkipped      = "skipped"      // it cannot be sent alone, or the request has too many or too much
	itemFailed       = "failed"
)

// Why nobody encodes although the decision wanted it.
const (
	localPrefill     = "the prefill endpoint encodes by itself"
	localDecode      = "the decode endpoint encodes by itself"
	localNoConnector = "no encoder connector is configured (disaggregation.ecConnector)"
	localAPI         = "the encoder connector does not serve this API"
)

// encoder is an encoder connector in use; without a Encoder there is none.
type encoder struct {
	connectors.Encoder
	connectors.EncoderTraits
}

// Encodes reports whether the encode phase is of use: an encoder connector is configured, or there may be sidecars that
// have one of their own and only need names.
func (o *Orchestrator) Encodes() bool {
	s := o.settings.Load()
	switch s.Mode {
	case modeOff:
		return false
	case modeOrchestrate:
		return s.encoder.Encoder != nil
	default:
		return true
	}
}

// encode runs the encode phase, if the decision has one. An error ends the request; a failed item under
// onFailure: aggregate does not, its raw media stays.
func (r *run) encode(ctx context.Context) error {
	if !r.encodes() {
		return nil
	}
	delegated := r.delegates()
	if reason := r.encodesNot(delegated); reason != "" {
		r.out.EncodeReason = reason
		r.o.metrics.encodeItems.WithLabelValues(itemLocal).Add(float64(len(r.j.Request.Media)))
		return nil
	}
	r.o.peers.sweep(r.o.snapshot())
	homes := r.homes()
	if len(homes) == 0 {
		r.o.metrics.encodeItems.WithLabelValues(itemFailed).Add(float64(len(r.j.Request.Media)))
		return r.encodeFailed(&itemFailure{result: result{reason: reasonNoEncoder}})
	}
	enc := newEncoding(r)
	if delegated {
		r.nameEncoders(enc, homes)
		return nil
	}
	ctx, cancel := context.WithDeadlineCause(ctx, r.deadline, ErrBudgetSpent)
	defer cancel()
	ctx, end := startSpan(ctx, scheduler.PhaseEncode)
	defer end()
	began := time.Now()
	defer func() {
		r.out.EncodeTime = time.Since(began)
		r.o.metrics.phaseSeconds.WithLabelValues(scheduler.PhaseEncode.String()).Observe(r.out.EncodeTime.Seconds())
	}()
	if r.out.way != wayOrchestrate { // else prefill earns the request's part
		r.o.retries.earn()
	}
	if err := newFanOut(r, enc, homes).do(ctx); err != nil {
		return err
	}
	if len(r.out.Encoders) > 0 {
		r.out.encoding = enc
		r.o.reach(ctx, r.out, EncodeComplete)
	}
	return nil
}

// encodes reports whether the request has anything to encode apart, and may.
func (r *run) encodes() bool {
	pick, req := r.j.Decision.Phase(scheduler.PhaseEncode), r.j.Request
	return (pick.Run || pick.Wanted) && r.s.Mode != modeOff && len(req.Media) > 0 &&
		r.j.Body != nil && req.Bars&inference.BarNotJSON == 0 && (!req.HasTransferFields || !r.s.AcceptClientTransferFields)
}

// delegates reports whether a sidecar at the decode endpoint runs the phases before decode.
func (r *run) delegates() bool {
	return r.s.Mode == modeHeaders || r.s.Mode == modeAuto && r.j.Decode != nil && r.j.Decode.Sidecar == pool.SidecarPresent
}

// encodesNot tells why nothing is encoded apart; "" when it is.
func (r *run) encodesNot(delegated bool) string {
	prefiller := r.firstPrefiller()
	switch {
	case prefiller != nil && prefiller.Role.Has(pool.RoleEncode):
		return localPrefill
	case prefiller == nil && r.j.Decode != nil && r.j.Decode.Role.Has(pool.RoleEncode):
		return localDecode
	case delegated:
		return ""
	case r.s.encoder.Encoder == nil:
		return localNoConnector
	case !r.s.encoder.Serves(r.j.Request.API):
		return localAPI
	}
	return ""
}

// firstPrefiller is the prefill endpoint that is about to be asked; nil where decode prefills.
func (r *run) firstPrefiller() *pool.Endpoint {
	if r.out.way == wayAggregated {
		return nil
	}
	now := time.Now()
	ranked := r.j.Decision.Phase(scheduler.PhasePrefill).Ranked
	for i := range ranked {
		if e, _ := r.usable(ranked[i].Endpoint, i == 0, now); e != nil {
			return e
		}
	}
	return nil
}

// nameEncoders leaves encoding to the decode endpoint's sidecar and tells it where: to the homes of the items. Such
// sidecars hand out items in turn, and a list of all would take an image elsewhere each time.
func (r *run) nameEncoders(enc *encoding, homes []home) {
	for i := range enc.items {
		r.out.addEncoder(homes[best(homes, enc.items[i].hash, nil)].e)
	}
}

// encodeFailed ends the request, unless decode may go on with raw media.
func (r *run) encodeFailed(f *itemFailure) error {
	if r.s.OnFailure != "fail" || sequelOf(f.reason).alone {
		return nil
	}
	e := &PhaseError{Phase: scheduler.PhaseEncode, Attempt: f.attempts, Status: f.status, Reason: f.reason, Err: f.err}
	if f.endpoint != nil {
		e.Endpoint = f.endpoint.Hostport
	}
	return e
}

// addEncoder notes who encoded, each endpoint once.
func (out *Outcome) addEncoder(e *pool.Endpoint) {
	if !slices.Contains(out.Encoders, e) {
		out.Encoders = append(out.Encoders, e)
	}
}

// encoderHosts is the value of x-encoder-hosts-ports; "" when nobody encodes apart.
func (out *Outcome) encoderHosts() string {
	hosts := make([]string, len(out.Encoders))
	for i, e := range out.Encoders {
		hosts[i] = e.Hostport
	}
	return strings.Join(hosts, ",")
}
