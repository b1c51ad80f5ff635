{{- define "posttrain.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* 50 characters leave room for the suffixes: -status, -trainers, -cluster. */}}
{{- define "posttrain.fullname" -}}
{{- $name := include "posttrain.name" . }}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) }}
{{- default $full .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "posttrain.selector" -}}
app.kubernetes.io/name: {{ include "posttrain.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{- define "posttrain.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: posttrain
{{ include "posttrain.selector" . }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "posttrain.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "posttrain.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- required "serviceAccount.name: required with serviceAccount.create: false (found nothing). Name a service account that exists in the release's namespace." .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* Takes {image, root}: repository, then digest or tag or the chart's appVersion. */}}
{{- define "posttrain.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ default .root.Chart.AppVersion .image.tag }}
{{- end }}
{{- end }}

{{/* The one Secret of the operator: the status server's keys. */}}
{{- define "posttrain.statusSecret" -}}
{{ include "posttrain.fullname" . }}-status
{{- end }}
