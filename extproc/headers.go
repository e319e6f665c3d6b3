// SPDX-License-Identifier: Apache-2.0

package extproc

import (
	"net/netip"
	"slices"
	"strings"
	"unsafe"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/scheduler"
)

// isControl reports whether a request header (lower case) is one that only a picker or gateway may set. Client copies
// leave the request through remove_headers; merely not setting them again would let them pass (docs/design.md 3.6).
func isControl(name string) bool {
	if !strings.HasPrefix(name, "x-") {
		return false
	}
	switch name {
	case HeaderDestination, KeyServed, KeySubset, HeaderDestination + "-scores", HeaderDestination + "-fallback",
		"x-prefiller-host-port", "x-prefiller-url", "x-encoder-hosts-ports", "x-kv-cache-source-host-port", "x-data-parallel-host-port",
		"x-processor-attempt", "x-baton-depth", HeaderOutcome, HeaderReason:
		return true
	default:
		return false
	}
}

// readHeaders takes the request's headers and the names of control headers the client sent.
func readHeaders(h *extprocv3.HttpHeaders) (headers inference.Headers, control []string) {
	raw := h.GetHeaders().GetHeaders()
	headers = make(inference.Headers, 0, len(raw))
	for _, hv := range raw {
		name := hv.GetKey()
		headers = append(headers, inference.Header{Name: name, Value: headerValue(hv)})
		if isControl(name) {
			control = append(control, name)
		}
	}
	return headers, control
}

// headerValue reads a header whichever of its two fields the gateway filled. The bytes belong to the message, which
// nobody changes, so they need no copy.
func headerValue(hv *corev3.HeaderValue) string {
	if raw := hv.GetRawValue(); len(raw) > 0 {
		return unsafe.String(unsafe.SliceData(raw), len(raw)) //nolint:gosec // the message is immutable and outlives the string
	}
	return hv.GetValue()
}

// readSubset reads the subset hint: a list of "ip:port" strings, or one comma-joined string. What cannot be read is an
// empty hint, hence 503: reading it as absent would pick outside of what the gateway allows (P4, P5).
func readSubset(m *corev3.Metadata) scheduler.Subset {
	ns := m.GetFilterMetadata()[NamespaceSubset]
	v, given := ns.GetFields()[KeySubset]
	if !given {
		return scheduler.Subset{}
	}
	s := scheduler.Subset{Given: true}
	switch k := v.GetKind().(type) {
	case *structpb.Value_StringValue:
		for item := range strings.SplitSeq(k.StringValue, ",") {
			s.Addrs = appendAddr(s.Addrs, item)
		}
	case *structpb.Value_ListValue:
		for _, item := range k.ListValue.GetValues() {
			s.Addrs = appendAddr(s.Addrs, item.GetStringValue())
		}
	}
	return s
}

func appendAddr(addrs []netip.AddrPort, text string) []netip.AddrPort {
	a, err := netip.ParseAddrPort(strings.TrimSpace(text))
	if err != nil {
		return addrs
	}
	return append(addrs, netip.AddrPortFrom(a.Addr().Unmap(), a.Port()))
}

// readUndelivered reports whether the gateway says that it made the response itself because the request did not reach the
// endpoint: the attribute response.code_details, as Envoy 1.40 writes it. Without the attribute nothing is known. It speaks
// of the last try: a gateway that retries, which the shipped configurations do not, may have delivered an earlier one.
func readUndelivered(msg *extprocv3.ProcessingRequest) bool {
	details := msg.GetAttributes()["envoy.filters.http.ext_proc"].GetFields()["response.code_details"].GetStringValue()
	if reason, ok := strings.CutPrefix(details, "upstream_reset_before_response_started{"); ok {
		return slices.ContainsFunc([]string{"remote_connection_failure", "local_connection_failure", "connection_timeout", "overflow"},
			func(unreached string) bool { return strings.HasPrefix(reason, unreached) })
	}
	return false // no_healthy_upstream too may follow a delivery, where a gateway retries
}

// readServed reads who served: the metadata of P13, else the upstream address attribute.
func readServed(msg *extprocv3.ProcessingRequest) string {
	ns := msg.GetMetadataContext().GetFilterMetadata()[NamespaceDestination]
	if v := ns.GetFields()[KeyServed].GetStringValue(); v != "" {
		return v
	}
	return msg.GetAttributes()["envoy.filters.http.ext_proc"].GetFields()["upstream.address"].GetStringValue()
}
