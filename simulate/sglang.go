// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// SGLang's transfer backends: values of [Options.Connector] for its engines; "" is Mooncake. They differ in what becomes
// of a prefill whose decode leg never comes.
const (
	backendMooncake = "mooncake" // freed after SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT
	backendNIXL     = "nixl"     // never freed
)

// SGLang's timers, before scaling. The prefill side's is the row of wireKinds.
const (
	sglangWaiting   = 300 * time.Second // SGLANG_DISAGGREGATION_WAITING_TIMEOUT, of a decode leg
	sglangHeartbeat = 5 * time.Second   // of a decode engine with the prefill engines it has rooms with
	sglangMisses    = 2                 // heartbeats missed before the rooms fail
)

const labelBootstrapPort = "sglang.ai/bootstrap-port"

// sglangWire is SGLang's disaggregation: both legs come at once with the same room, and the prefill engine writes to the
// decode engine. The engine's role is its --disaggregation-mode; one without a role serves whole requests.
type sglangWire struct {
	p       *process
	rooms   rooms
	flights flights
}

// sglangPrefillWire adds the bootstrap server, which only a prefill engine has.
type sglangPrefillWire struct{ *sglangWire }

func newSGLang(p *process) wire {
	w := &sglangWire{p: p}
	w.rooms.open = map[int64]*room{}
	w.flights.running = map[*flight]struct{}{}
	if p.e.opts.Role == phasePrefill {
		return sglangPrefillWire{w}
	}
	return w
}

// sglangOf is the wire of an SGLang process, nil for another one's.
func sglangOf(p *process) *sglangWire {
	switch w := p.wire.(type) {
	case *sglangWire:
		return w
	case sglangPrefillWire:
		return w.sglangWire
	}
	return nil
}

// sglangLabels tells routers the bootstrap port.
func sglangLabels(e *Engine) map[string]string {
	if port := e.BootstrapPort(); port > 0 {
		return map[string]string{labelBootstrapPort: strconv.Itoa(port)}
	}
	return nil
}

// sideHandler is the bootstrap server: its health is the heartbeat's.
func (w sglangPrefillWire) sideHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", func(rw http.ResponseWriter, _ *http.Request) { _, _ = rw.Write([]byte("OK")) })
	mux.HandleFunc("GET /route", func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set("Content-Type", "application/json")
		_, _ = rw.Write(marshal(struct {
			TP       int    `json:"attn_tp_size"`
			DP       int    `json:"dp_size"`
			PP       int    `json:"pp_size"`
			PageSize int    `json:"page_size"`
			KVType   string `json:"kv_cache_dtype"`
		}{w.p.e.opts.TPSize, 1, 1, w.p.e.opts.BlockSize, w.p.e.opts.KVCacheDtype}))
	})
	return mux
}

// stop leaves the rooms as they are: their decode legs find out by heartbeat.
func (w *sglangWire) stop() {}

// read reads the three bootstrap fields. A prefill engine ignores where the bootstrap server is: it is its own.
func (w *sglangWire) read(c *call, f *fields) (leg, *apiError) {
	if c.api != apiNative {
		c.readRequestIDs(f)
	}
	role := w.p.e.opts.Role
	if role != phasePrefill && role != phaseDecode {
		return nil, nil //nolint:nilnil // a plain request
	}
	n := len(c.prompts) * c.n
	numbers, bad := bootstrapRooms(f, n)
	if bad != nil {
		return nil, bad
	}
	if numbers == nil {
		return nil, badRequest("", "Invalid request: Disaggregated request received without bootstrap room id. req.rid='%s'", c.id)
	}
	common := sglangLeg{w: w, numbers: numbers}
	if role == phasePrefill {
		c.maxTokens, c.minTokens, c.natural, c.each = 1, 0, false, nil
		return &sglangPrefill{sglangLeg: common}, nil
	}
	d := &sglangDecode{sglangLeg: common}
	if d.hosts, bad = bootstrapList[string](f, "bootstrap_host", n); bad != nil {
		return nil, bad
	}
	if d.ports, bad = bootstrapList[int](f, "bootstrap_port", n); bad != nil {
		return nil, bad
	}
	for i, port := range d.ports {
		if port == 0 {
			d.ports[i] = defaultBootstrapPort
		}
	}
	return d, nil
}

// defaultBootstrapPort stands for a bootstrap_port of null.
const defaultBootstrapPort = 8998

// bootstrapRooms reads bootstrap_room for n sequences: one number, which the others count on from, or an array; nil when
// there is none.
func bootstrapRooms(f *fields, n int) ([]int64, *apiError) {
	const name = "bootstrap_room"
	v, ok := f.raw(name)
	if !ok {
		return nil, nil
	}
	if v[0] == '[' {
		list, bad := bootstrapList[*int64](f, name, n)
		if bad != nil {
			return nil, bad
		}
		out := make([]int64, len(list))
		for i, one := range list {
			if one == nil || *one < 0 {
				return nil, nil
			}
			out[i] = *one
		}
		return out, nil
	}
	var first int64
	if err := json.Unmarshal(v, &first); err != nil || first < 0 || first > first+int64(n) {
		return nil, invalid("body."+name, "int_type", "Input should be a valid integer", string(v[:min(len(v), 40)]))
	}
	out := make([]int64, n)
	for i := range out {
		out[i] = first + int64(i)
	}
	return out, nil
}

// bootstrapList reads a field for n sequences: one value for all, or an array of n. What is missing or null is zero.
func bootstrapList[T string | int | *int64](f *fields, name string, n int) ([]T, *apiError) {
	out := make([]T, n)
	v, ok := f.raw(name)
	if !ok {
		return out, nil
	}
	if v[0] == '[' {
		var list []T
		if err := json.Unmarshal(v, &list); err != nil {
			return nil, invalid("body."+name, "list_type", "Input should be a valid list", string(v[:min(len(v), 40)]))
		}
		if len(list) != n {
			return nil, badRequest(name, "The length of %s should be equal to the batch size: %d, got %d.", name, n, len(list))
		}
		return list, nil
	}
	var one T
	if err := json.Unmarshal(v, &one); err != nil {
		return nil, invalid("body."+name, "value_error", "Input should be a valid value", string(v[:min(len(v), 40)]))
	}
	for i := range out {
		out[i] = one
	}
	return out, nil
}

// prefillAt finds the prefill process behind a bootstrap server, as seen from p; nil when there is none.
func (p *process) prefillAt(host string, port int) *process {
	ip, err := netip.ParseAddr(strings.Trim(host, "[]"))
	if host == "localhost" {
		ip, err = p.addr.Addr(), nil
	}
	if err != nil {
		return nil
	}
	for _, e := range p.e.registry.all() {
		peer := e.running()
		if peer == nil || e.BootstrapPort() != port || e.Addr().Addr() != ip {
			continue
		}
		if _, ok := peer.wire.(sglangPrefillWire); ok {
			return peer
		}
	}
	return nil
}

// transferFailed is the answer to a leg whose transfer came to nothing.
func transferFailed(side string, room int64, why string) *apiError {
	return &apiError{
		status: http.StatusInternalServerError, kind: "InternalServerError",
		message: fmt.Sprintf("%s transfer failed for request with exception KVTransferError(bootstrap_room=%d): %s", side, room, why),
	}
}
